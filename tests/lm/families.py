"""Tiny random models of every causal family in transformers, and what becomes of each: right, refused, or wrong."""

from __future__ import annotations

import copy
import inspect
import math
import signal
import string
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from policyopt.lm import (
    DPOConfig,
    GRPOConfig,
    LanguageModel,
    SamplingConfig,
    SFTConfig,
    TransformersSampler,
    completion_log_probs,
    train_dpo,
    train_grpo,
    train_sft,
)
from policyopt.lm.sequences import Sequences

ALPHABET = string.ascii_letters + string.digits + " .,:;?!"
V = len(ALPHABET) + 3
EOS, PAD = 1, 2
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [20], [21, 22, 23, 24, 25]]
NEW_TOKENS, CLOSE, SECONDS, MOST = 12, 2e-3, 60, 8_000_000


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per letter."""
    vocabulary = {token: i for i, token in enumerate(["<bos>", "<eos>", "<pad>", *ALPHABET])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


# --- tiny configurations --------------------------------------------------------------------------------------

# What a name means in one configuration it means in nearly all.
SIZES: tuple[tuple[Any, str], ...] = (
    (2, """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers
        num_decoder_layers num_key_value_heads num_experts_per_tok linear_num_key_heads expand mamba_expand
        num_key_value_heads_swa swa_num_key_value_heads moe_k moe_topk num_experts_per_token
        global_num_key_value_heads zero_expert_num"""),
    (4, """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads linear_num_value_heads attention_heads mamba_n_heads
        num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim qk_nope_head_dim rotary_dim
        state_size laurel_rank mamba_dt_rank time_step_rank n_mamba_heads"""),
    (8, """head_dim v_head_dim kv_lora_rank q_lora_rank mamba_d_state ssm_state_size linear_key_head_dim dim_head d_kv
        linear_value_head_dim mamba_chunk_size chunk_size mamba_head_dim mamba_d_head kv_channels index_head_dim
        hidden_size_per_layer_input mamba_headdim swa_head_dim swa_v_head_dim global_head_dim"""),
    (32, """hidden_size d_model n_embd embed_dim embedding_size word_embed_proj_dim attention_hidden_size lru_width
        emb_dim mamba_d_ssm projection_dim hidden_dim output_hidden_size out_hidden_size text_embed_dim
        input_embedding_size output_embedding_size index_n_heads"""),
    (48, """intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim moe_intermediate_size d_ff d_inner
        ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size block_ff_dim dim_ff
        moe_shared_expert_intermediate_size encoder_intermediate_size intermediate_size_mlp expert_ffn_hidden_size"""),
    (1, """n_group topk_group first_k_dense_replace num_shared_experts n_shared_experts num_loops num_mem_blocks
        n_groups mamba_n_groups num_dense_layers mamba_ngroups moe_num_shared_experts depth"""),
    (128, """max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len context_length
        max_source_positions max_target_positions seq_length"""),
    (0, """num_nextn_predict_layers num_kv_shared_layers router_aux_loss_coef attention_dropout attn_pdrop resid_pdrop
        embd_pdrop dropout activation_dropout hidden_dropout attention_probs_dropout_prob hidden_dropout_prob
        residual_dropout embedding_dropout classifier_dropout router_jitter_noise input_jitter_noise bos_token_id
        decoder_start_token_id"""),
    # A window that bites. Sparse attention keeps all: random weights tie, and rounding would decide.
    (6, "sliding_window attention_window_size local_attention window_size"),
    (64, "index_topk"),
    (0.3, "initializer_range init_std"),
    (V, "vocab_size vocab_size_per_layer_input unpadded_vocab_size src_vocab_size decoder_vocab_size tgt_vocab_size"),
    (EOS, "eos_token_id"),
    (PAD, "pad_token_id"),
)  # fmt: skip
SMALL = {name: value for value, names in SIZES for name in names.split()}
LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_encoder_layers",
)
_MLA = {"head_dim": 4, "qk_head_dim": 8, "num_key_value_heads": 4}
_SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64}
_HYBRID = {"num_hidden_layers": 2}
_DECODER = {"is_decoder": True}
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
# What the rule above cannot know.
EXTRA: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": _MLA,
    "bamba": {**_SSM, "attn_layer_indices": [1]},
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "big_bird": _DECODER,
    "camembert": _DECODER,
    "data2vec-text": _DECODER,
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
             "ffn_config": {"ffn_hidden_size": 48}},
    "deepseek_v2": {**_MLA, **_EXPERTS},
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "dots1": _EXPERTS,
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "electra": _DECODER,
    "ernie": _DECODER,
    "falcon": {"num_kv_heads": 4},
    "falcon_h1": _SSM,
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**_SSM, **_HYBRID, "layer_types": ["mamba", "attention"], "num_local_experts": 0,
                         "num_experts_per_tok": 0},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
              "use_mamba_kernels": False},
    "lfm2": {**_HYBRID, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**_HYBRID, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": _MLA,
    "mamba2": {"num_heads": 8, "state_size": 8},
    "megatron-bert": _DECODER,
    "minicpm3": _MLA,
    "ministral": {"head_dim": 8},
    "mistral4": _MLA,
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {**_HYBRID, "layer_types": ["mamba", "full_attention"], "mamba_num_heads": 8, "time_step_min": 1e-20},
    "prophetnet": {"num_encoder_layers": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {**_DECODER, "axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "rembert": _DECODER,
    "roberta": _DECODER,
    "roberta-prelayernorm": _DECODER,
    "roc_bert": {**_DECODER, "enable_pronunciation": False, "enable_shape": False},
    "roformer": _DECODER,
    "xlm-roberta": _DECODER,
    "xlm-roberta-xl": _DECODER,
    "xlnet": {"d_head": 8},
    "xlstm": {"num_blocks": 2},
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "youtu": _MLA,
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {**_HYBRID, "layers_block_type": ["mamba", "hybrid"], "mamba_headdim": 8, "n_mamba_heads": 8,
               "num_key_value_heads": 4, "attention_head_dim": 16, "attention_hidden_size": 64, "time_step_min": 1e-20},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# More than one cache, mask or position code per class, and what is known to be wrong.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon (alibi)": ("falcon", {"alibi": True}),
    "llama (eager)": ("llama", {"attn_implementation": "eager"}),
    "bert-generation (is_decoder=False)": ("bert-generation", {"is_decoder": False}),
    "nemotron_h (time_step_min=0.001)": ("nemotron_h", {"time_step_min": 0.001}),
    "zamba2 (time_step_min=0.001)": ("zamba2", {"time_step_min": 0.001}),
}


def names() -> list[str]:
    """Model types of the installed transformers that AutoModelForCausalLM knows, and the variants."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) + [
        n for n in VARIANTS if VARIANTS[n][0] in CONFIG_MAPPING
    ]


def _kept_layers(settings: dict[str, Any]) -> tuple[int, list[int]]:
    """The number of layers, and which to keep so that each kind of layer stays."""
    layers = next((settings[key] for key in LAYERS if isinstance(settings.get(key), int)), 0)
    lists = [value for value in settings.values() if isinstance(value, list) and len(value) == layers > 2]
    kinds = list(zip(*lists, strict=True)) if lists else []
    kept = [i for i, kind in enumerate(kinds) if str(kind) not in map(str, kinds[:i])][:6]
    return layers, (kept if len(kept) > 1 else [0, 1])


def _shrink(settings: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """What to change in a configuration and those inside it, to make it tiny."""
    layers, kept = _kept_layers(settings)
    changes: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and "rope" not in key:
            inner = _shrink(value, extra)
            if inner and key.endswith(("config", "decoder", "encoder")):
                kind = {"model_type": value["model_type"]} if value.get("model_type") else {}
                changes[key] = kind | inner
            elif key == "per_layer_config":
                changes[key] = None
        elif isinstance(value, list) and len(value) == layers > 2:
            changes[key] = [value[i] for i in kept]
        elif key in LAYERS:
            changes[key] = len(kept)
        elif key in SMALL and (
            (isinstance(value, (int, float)) and not isinstance(value, bool)) or key.endswith("_token_id")
        ):
            changes[key] = float(SMALL[key]) if isinstance(value, float) else SMALL[key]
    return changes | {key: value for key, value in extra.items() if key in settings}


def build(name: str) -> Any:
    """A tiny random model in evaluation mode."""
    kind, options = VARIANTS.get(name, (name, {}))
    config_class = CONFIG_MAPPING[kind]
    extra = {**EXTRA.get(kind, {}), **options}
    attention = extra.pop("attn_implementation", None)
    settings = _shrink(config_class().to_dict(), extra)
    accepted = inspect.signature(config_class.__init__).parameters
    settings |= {key: value for key, value in extra.items() if key in accepted}
    config = config_class(**settings)
    torch.manual_seed(0)
    more = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config, **more).parameters())
    if count > MOST:
        raise ValueError(f"{count:,} parameters are too many to be tried")
    model = AutoModelForCausalLM.from_config(config, **more)
    for parameter in model.parameters():
        if parameter.dim() >= 2 and parameter.std() < 0.05:
            torch.nn.init.normal_(parameter, 0, 0.2)
    model = model.float().eval()
    if model.generation_config is None:
        model.generation_config = transformers.GenerationConfig()
    model.generation_config.eos_token_id = EOS
    return model


# --- the verdict ----------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What became of one model."""

    name: str
    model: str
    outcome: str
    """"right", "scores" (right, but refuses to sample), "refused", "not built" or "wrong"."""
    difference: float | None
    """Largest difference of a log-probability from the whole model's, in nats."""
    why: str = ""


@torch.no_grad()
def whole(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-probabilities by the model as it is: one row, no padding, no cache."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0].float()
    chosen = torch.tensor(completion)[:, None]
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, chosen)[:, 0]


@torch.no_grad()
def _difference(lm: LanguageModel, prompts: list[list[int]], sampled: bool) -> float:
    """Sampler, shared and separate scorer against the whole model."""
    samples = None
    if sampled:
        config = SamplingConfig(max_new_tokens=NEW_TOKENS)
        samples = TransformersSampler(lm).sample(prompts, 3, config, seed=3)
        sequences = samples.sequences
    else:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(3, V, (3 * len(prompts), NEW_TOKENS), generator=generator).tolist()
        index = [i // 3 for i in range(len(drawn))]
        rows = [row[: 1 + 2 * i % 11] for i, row in enumerate(drawn)]
        sequences = Sequences.pad(prompts, rows, index, pad_id=PAD)
    found = [completion_log_probs(lm.model, sequences, share_prompts=s).log_probs for s in (True, False)]
    found += [] if samples is None else [samples.log_probs]
    worst = 0.0
    for row, length in enumerate(sequences.lengths.tolist()):
        completion = sequences.completion_ids[row, :length].tolist()
        wanted = whole(lm.model, prompts[int(sequences.prompt_index[row])], completion)
        for log_probs in found:
            worst = max(worst, float((log_probs[row, :length] - wanted).abs().nan_to_num(math.inf).max()))
    return worst


DATA = [
    {"prompt": "abc", "completion": "de", "chosen": "de", "rejected": "fghi"},
    {"prompt": "q", "completion": "rstu", "chosen": "rstu", "rejected": "v"},
]


def _train(lm: LanguageModel, sampled: bool) -> None:
    """One step of each trainer: the first margin is 0, and so is the first KL."""
    common: dict[str, Any] = {"updates": 1, "batch_size": 2, "learning_rate": 1e-4}
    results = [
        train_sft(lm.copy(), DATA, SFTConfig(**common), progress=False),
        train_dpo(lm.copy(), DATA, DPOConfig(**common), progress=False),
    ]
    if sampled:
        short = SamplingConfig(max_new_tokens=6)
        config = GRPOConfig(**common, group_size=4, sampling=short, beta=0.1)

        def reward(completions: list[str], **_: Any) -> list[float]:
            return [float(len(set(text))) for text in completions]

        prompts = [{"prompt": row["prompt"]} for row in DATA]
        results.append(train_grpo(lm.copy(), prompts, reward, config, progress=False))
    for result in results:
        if not math.isfinite(result.history[-1].gradient_norm):
            raise AssertionError(f"gradient norm {result.history[-1].gradient_norm}")


class _TooLong(Exception):  # noqa: N818
    pass


@contextmanager
def _at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TooLong(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def judge(name: str) -> Verdict:
    """Build a family's model and try everything on it."""
    label = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(VARIANTS.get(name, (name,))[0], name)
    label = label if isinstance(label, str) else label[0]
    try:
        with _at_most(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build(name)
            label = type(model).__name__
            model(input_ids=torch.tensor([[5, 6, 7]]))
    except Exception as error:
        return Verdict(name, label, "not built", None, _said(error))
    lm = LanguageModel(model, tokenizer(), name)
    sampled, why = True, ""
    try:
        with _at_most(2 * SECONDS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                TransformersSampler(lm).sample(PROMPTS, 1, SamplingConfig(max_new_tokens=2), seed=0)
            except ValueError as error:
                if "cannot be sampled" not in str(error):
                    return Verdict(name, label, "refused", None, str(error))
                sampled, why = False, str(error)
            equal = [PROMPTS[0], [9, 8, 7]]
            worst = max(_difference(lm, prompts, sampled) for prompts in (PROMPTS, equal, PROMPTS[:1]))
            _train(LanguageModel(copy.deepcopy(model), lm.tokenizer, name), sampled)
    except _TooLong as error:
        return Verdict(name, label, "not built", None, _said(error))
    except Exception as error:
        outcome = "refused" if "must allow gradients without dropout" in str(error) else "wrong"
        return Verdict(name, label, outcome, None, _said(error))
    if not worst <= CLOSE:
        return Verdict(name, label, "wrong", worst, why)
    return Verdict(name, label, "right" if sampled else "scores", worst, why)
