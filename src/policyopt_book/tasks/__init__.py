"""Tasks whose truth is known, so that a reward, a reward model and a policy can be
checked against it.
"""
