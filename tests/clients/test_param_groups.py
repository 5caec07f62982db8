"""``param_groups`` of models out of transformers: what each parameter is taken for; and that the groups train."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch

from helpers.param_groups import taken
from learned_optim import LearnedOptimizer, param_groups
from learned_optim.engine.kinds import TensorKind

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
        {
            "*embeddings*": EMBEDDING, "*norm*": VECTOR, "*conv1d.weight": CONV,
            "*.in_proj.weight": "matrix split=2", "*.x_proj.weight": "matrix split=(1, 4, 4)", "*.weight": MATRIX,
        },
    ),
    "Mamba2ForCausalLM": (
        {**TEXT, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "num_heads": 4, "head_dim": 8,
         "n_groups": 2},
        {
            "*embeddings*": EMBEDDING, "*norm*": VECTOR, "*conv1d.weight": CONV, "lm_head.*": HEAD,
            "*.in_proj.weight": "matrix split=(32, 32, 8, 8, 4)", "*.weight": MATRIX,
        },
    ),
    "GPTNeoXForCausalLM": (
        {**SMALL, **TEXT, "tie_word_embeddings": False},
        {
            "*embed_in*": EMBEDDING, "lm_head.*": HEAD, "*norm*": VECTOR,
            "*.query_key_value.weight": "matrix split=6", "*.query_key_value.bias": "vector split=6 -",
            "*.weight": MATRIX,
        },
    ),
    "BloomForCausalLM": (
        {**TEXT, "hidden_size": 16, "n_layer": 1, "n_head": 2},
        {
            "*embeddings.weight": EMBEDDING, "*norm*": VECTOR, "*.ln_f.*": VECTOR,
            "*.query_key_value.weight": "matrix split=6", "*.query_key_value.bias": "vector split=6 -",
            "*.weight": MATRIX,
        },
    ),
    "FalconForCausalLM": (  # four heads that share two keys and two values
        {**TEXT, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "num_kv_heads": 2,
         "new_decoder_architecture": True},
        {
            "*embeddings*": EMBEDDING, "*.ln_*": VECTOR, "*.query_key_value.weight": "matrix split=8",
            "*.weight": MATRIX,
        },
    ),
    "CodeGenForCausalLM": (  # queries, values and keys of a quarter of the heads, four times
        {**TEXT, "n_embd": 16, "n_layer": 1, "n_head": 4, "rotary_dim": 4},
        {
            "*.wte.*": EMBEDDING, "lm_head.weight": HEAD, "*.ln_*": VECTOR, "*.qkv_proj.weight": "matrix split=12",
            "*.weight": MATRIX,
        },
    ),
    "GPTBigCodeForCausalLM": (  # four queries, a key and a value
        {**TEXT, "n_embd": 16, "n_layer": 1, "n_head": 4},
        {
            "*.wte.*": EMBEDDING, "*.wpe.*": EMBEDDING, "*.ln_*": VECTOR, "*.c_attn.weight": "matrix split=6",
            "*.c_attn.bias": "vector split=6 -", "*.weight": MATRIX,
        },
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


def pieces_of(model, layer):
    """The tensors that a layer's weight and bias hold according to ``param_groups``, in order."""
    module = model.get_submodule(layer)
    kinds = {p: TensorKind.of(group) for group in param_groups(model) for _, p in group["params"]}
    tensors = [p for p in (module.weight, module.bias) if p is not None]
    return [[part.of(p.detach(), (0,) * p.ndim)[0] for part in kinds[p].parts(p)] for p in tensors]


def changes(model, change):
    """How far the outputs move when some pieces of the model are changed."""
    tokens = torch.randint(3, 32, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        change()
        return (model(input_ids=tokens).logits - before).abs().max() / before.abs().max()


#: Which pieces are the queries and the keys that are multiplied with each other, all of one head or of one group.
PAIRS = {
    "GPTNeoXForCausalLM": ("gpt_neox.layers.0.attention.query_key_value", [([3 * h], 3 * h + 1) for h in range(2)]),
    "BloomForCausalLM": ("transformer.h.0.self_attention.query_key_value", [([3 * h], 3 * h + 1) for h in range(2)]),
    "FalconForCausalLM": ("transformer.h.0.self_attention.query_key_value", [([0, 1], 2), ([4, 5], 6)]),
    "CodeGenForCausalLM": ("transformer.h.0.attn.qkv_proj", [([3 * h], 3 * h + 2) for h in range(4)]),
    "GPTBigCodeForCausalLM": ("transformer.h.0.attn.c_attn", [([0, 1, 2, 3], 4)]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_pieces_of_packed_projections_are_queries_and_keys(name):
    """Queries times four and their keys over four: the model computes what it did."""
    layer, pairs = PAIRS[name]
    for queries, key in pairs:
        model = built(name).eval()
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.5)  # attention that attends to something
        packed = pieces_of(model, layer)

        def together(packed=packed, queries=queries, key=key):
            for pieces in packed:
                pieces[key] /= 4.0
                for query in queries:
                    pieces[query] *= 4.0

        def keys_alone(packed=packed, key=key):
            for pieces in packed:
                pieces[key] *= 4.0

        assert changes(model, together) < 1e-5
        assert changes(model, keys_alone) > 1e-3


@pytest.mark.parametrize(("name", "gate"), [("MambaForCausalLM", 1), ("Mamba2ForCausalLM", 0)])
@pytest.mark.parametrize("is_gate", [True, False])
def test_pieces_of_mambas_projection_are_gate_and_input(name, gate, is_gate):
    """A mixer is silent without its gate; without its input, the bias of its convolution still gets through."""
    model = built(name)
    (pieces,) = pieces_of(model, "backbone.layers.0.mixer.in_proj")
    pieces[gate if is_gate else 1 - gate].zero_()
    mixer = model.get_submodule("backbone.layers.0.mixer")
    torch.nn.init.ones_(mixer.conv1d.bias)
    assert bool(mixer(torch.randn(1, 5, 16)).count_nonzero()) is not is_gate


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MixtralForCausalLM", "Phi3ForCausalLM", "GPTNeoXForCausalLM"])
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
