"""``param_groups`` of models out of transformers: what each parameter is taken for; and that the groups train."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch

from helpers.param_groups import taken
from learned_optim import LearnedOptimizer, param_groups

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FEW = {"num_key_value_heads": 1, "tie_word_embeddings": False}
MATRIX, CONV, VECTOR, HEAD, EMBEDDING = "matrix", "conv", "vector -", "head", "embedding"

#: Class of the model, its configuration, and what parameters are, by pattern: the first that fits, else vectors.
MODELS = {
    "GPT2LMHeadModel": (
        {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16, "add_cross_attention": True, **TEXT},
        {
            "*.wte.weight": EMBEDDING, "*.wpe.weight": EMBEDDING,
            "*.attn.c_attn.weight": "matrix split=3 transposed=True", "*.attn.c_attn.bias": "vector split=3 -",
            "*.crossattention.c_attn.weight": "matrix split=2 transposed=True",
            "*.crossattention.c_attn.bias": "vector split=2 -", "*.ln_*": VECTOR, "*.weight": "matrix transposed=True",
        },
    ),
    "LlamaForCausalLM": (
        {**SMALL, **TEXT, **FEW},
        {"*embed_tokens*": EMBEDDING, "lm_head.*": HEAD, "*norm*": VECTOR, "*.weight": MATRIX},
    ),
    "BertForMaskedLM": (
        {**SMALL, **TEXT, "max_position_embeddings": 16},
        {"*LayerNorm*": VECTOR, "*embeddings.weight": EMBEDDING, "*.weight": MATRIX},
    ),
    "T5ForConditionalGeneration": (
        {**TEXT, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2},
        {"*norm*": VECTOR, "shared.weight": EMBEDDING, "*relative_attention_bias*": EMBEDDING, "*.weight": MATRIX},
    ),
    "ViTForImageClassification": (
        {**SMALL, "image_size": 8, "patch_size": 4},
        {"*norm*": VECTOR, "*position_embeddings": EMBEDDING, "*patch_embeddings*.weight": CONV, "*.weight": MATRIX},
    ),
    "MixtralForCausalLM": (
        {**SMALL, **TEXT, **FEW, "num_local_experts": 3},
        {
            "*embed_tokens*": EMBEDDING, "lm_head.*": HEAD, "*norm*": VECTOR,
            "*.gate_up_proj": "matrix stacked=1 split=2", "*.down_proj": "matrix stacked=1", "*.weight": MATRIX,
        },
    ),
    "GptOssForCausalLM": (  # gates and inputs of the experts take turns, row by row
        {**SMALL, **TEXT, **FEW, "num_local_experts": 3, "head_dim": 8},
        {
            "*embed_tokens*": EMBEDDING, "lm_head.*": HEAD, "*norm*": VECTOR, "*_proj_bias": "vector stacked=1 -",
            "*.experts.*": "matrix stacked=1 transposed=True", "*.weight": MATRIX,
        },
    ),
    "MambaForCausalLM": (
        {**TEXT, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4},
        {"*embeddings*": EMBEDDING, "*norm*": VECTOR, "*conv1d.weight": CONV, "*.weight": MATRIX},
    ),
    "Phi3ForCausalLM": (
        {**SMALL, **TEXT, **FEW},
        {
            "*embed_tokens*": EMBEDDING, "lm_head.*": HEAD, "*norm*": VECTOR,
            "*.qkv_proj.weight": "matrix split=(16, 8, 8)", "*.gate_up_proj.weight": "matrix split=2",
            "*.weight": MATRIX,
        },
    ),
    "WhisperForConditionalGeneration": (
        {
            **TEXT, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_mel_bins": 8,
            "max_source_positions": 8, "max_target_positions": 8, "decoder_start_token_id": 1,
        },
        {"*norm*": VECTOR, "*.embed_*": EMBEDDING, "*.conv?.weight": CONV, "*.weight": MATRIX},
    ),
    "ModernBertForMaskedLM": (
        {**SMALL, **TEXT, "cls_token_id": 0, "sep_token_id": 0},
        {"*norm*": VECTOR, "*embeddings*": EMBEDDING, "*.Wqkv.weight": "matrix split=3", "*.weight": MATRIX},
    ),
    "ConvNextForImageClassification": (
        {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
        {
            "*norm*": VECTOR, "*.dwconv.weight": CONV, "*.pwconv?.weight": MATRIX, "classifier.weight": MATRIX,
            "*.downsampling_layer.0.*": VECTOR, "*.weight": CONV,
        },
    ),
    "ResNetForImageClassification": (
        {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]},
        {"*normalization*": VECTOR, "classifier*.weight": MATRIX, "*.weight": CONV},
    ),
}  # fmt: skip


def built(name):
    torch.manual_seed(0)
    model = getattr(transformers, name, None)
    if model is None:
        pytest.skip(f"this transformers has no {name}")
    return model(model.config_class(**MODELS[name][0]))


@pytest.mark.parametrize("name", MODELS)
def test_each_tensor_is_taken_for_what_it_is(name):
    patterns = MODELS[name][1]
    table = taken(built(name))
    expected = {p: next((what for pattern, what in patterns.items() if fnmatchcase(p, pattern)), VECTOR) for p in table}
    assert table == expected
    assert all(any(fnmatchcase(p, pattern) for p in table) for pattern in patterns)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MixtralForCausalLM", "Phi3ForCausalLM"])
def test_a_language_model_learns_with_its_groups(name):
    model = built(name)
    optimizer = LearnedOptimizer(param_groups(model), lr=3e-3, backend="eager")
    tokens = torch.randint(3, 32, (4, 12), generator=torch.Generator().manual_seed(0)).sort(dim=1).values
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    packed = [p for group in optimizer.param_groups if "split" in group for p in group["params"]]
    assert packed
    assert all(len(optimizer.state[p]["step"]) > 1 for p in packed if p in optimizer.state)
