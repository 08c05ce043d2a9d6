"""Policy optimisation from Markov decision processes to PPO, in small readable parts."""

__version__ = "0.1.0"
