"""``param_groups``: what it takes each tensor of a model for, and that the groups train."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from helpers.param_groups import KEYS, taken
from helpers.support import assert_same_bits, copies, run
from learned_optim import LearnedOptimizer, param_groups


class LanguageModel(nn.Module):
    """A GPT as people write it: packed projections by name, learned positions, a tied head or one of its own."""

    def __init__(self, tied):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(65, 16), nn.Embedding(16, 16)
        self.block = nn.ModuleDict({"c_attn": nn.Linear(16, 48), "proj": nn.Linear(16, 16, bias=False)})
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 65, bias=False)
        if tied:
            self.head.weight = self.wte.weight


class Seq2Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.EmbeddingBag(30, 8)
        self.rnn = nn.LSTM(8, 6, proj_size=4)
        self.cell, self.plain = nn.GRUCell(4, 4), nn.RNN(4, 4)
        self.both = nn.Bilinear(4, 4, 3)


class Experts(nn.Module):
    def __init__(self, transposed):
        super().__init__()
        up, down = ((3, 8, 20), (3, 10, 8)) if transposed else ((3, 20, 8), (3, 8, 10))
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(up)), nn.Parameter(torch.randn(down))
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(3, 20))


class Vision(nn.Module):
    """A ConvNeXt's block, a ResNeXt's and a decoder; a class token and positions as bare parameters."""

    def __init__(self):
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 5, 8))
        self.gamma = nn.Parameter(torch.ones(8))
        self.depthwise, self.grouped = nn.Conv2d(8, 8, 7, groups=8), nn.Conv2d(8, 8, 3, groups=2)
        self.multiplied = nn.Conv1d(4, 8, 3, groups=4)
        self.norm, self.batch_norm, self.over_two = nn.GroupNorm(2, 8), nn.BatchNorm2d(8), nn.LayerNorm((4, 8))
        self.time, self.up = nn.Conv1d(8, 8, 3), nn.ConvTranspose2d(8, 4, 2)
        self.up_grouped = nn.ConvTranspose2d(8, 8, 2, groups=2)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(9, 2))
        self.mixing = nn.Parameter(torch.randn(5, 6))


TABLES = {
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 10)),
        {"0.weight": "matrix", "0.bias": "vector -", "1.weight": "matrix", "1.bias": "vector -"},
    ),
    "recommender": (
        lambda: nn.ModuleDict({"users": nn.Embedding(9, 4), "out": nn.Linear(4, 100)}),
        {"users.weight": "embedding", "out.weight": "head", "out.bias": "vector -"},
    ),
    "language model": (
        lambda: LanguageModel(tied=False),
        {
            "wte.weight": "embedding", "wpe.weight": "embedding", "block.c_attn.weight": "matrix split=3",
            "block.c_attn.bias": "vector split=3 -", "block.proj.weight": "matrix", "norm.weight": "vector -",
            "norm.bias": "vector -", "head.weight": "head",
        },
    ),
    "language model, tied": (
        lambda: LanguageModel(tied=True),
        {
            "wte.weight": "embedding", "wpe.weight": "embedding", "block.c_attn.weight": "matrix split=3",
            "block.c_attn.bias": "vector split=3 -", "block.proj.weight": "matrix", "norm.weight": "vector -",
            "norm.bias": "vector -",
        },
    ),
    "torch's transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16),
        {
            "self_attn.in_proj_weight": "matrix split=3", "self_attn.in_proj_bias": "vector split=3 -",
            "self_attn.out_proj.weight": "matrix", "self_attn.out_proj.bias": "vector -",
            **{f"linear{i}.weight": "matrix" for i in (1, 2)}, **{f"linear{i}.bias": "vector -" for i in (1, 2)},
            **{f"norm{i}.{name}": "vector -" for i in (1, 2) for name in ("weight", "bias")},
        },
    ),
    "attention with keys of another width": (
        lambda: nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True),
        {
            **{f"{x}_proj_weight": "matrix" for x in "qkv"}, "in_proj_bias": "vector split=3 -", "bias_k": "vector -",
            "bias_v": "vector -", "out_proj.weight": "matrix", "out_proj.bias": "vector -",
        },
    ),
    "recurrent": (
        Seq2Seq,
        {
            "embed.weight": "embedding",
            **{f"rnn.weight_{x}h_l0": "matrix split=4" for x in "ih"},
            **{f"rnn.bias_{x}h_l0": "vector split=4 -" for x in "ih"}, "rnn.weight_hr_l0": "matrix",
            **{f"cell.weight_{x}h": "matrix split=3" for x in "ih"},
            **{f"cell.bias_{x}h": "vector split=3 -" for x in "ih"},
            **{f"plain.weight_{x}h_l0": "matrix" for x in "ih"}, **{f"plain.bias_{x}h_l0": "vector -" for x in "ih"},
            "both.weight": "matrix", "both.bias": "vector -",
        },
    ),
    "experts": (
        lambda: Experts(transposed=False),
        {
            "gate_up_proj": "matrix stacked=1 split=2", "down_proj": "matrix stacked=1",
            "gate_up_proj_bias": "vector stacked=1 -",
        },
    ),
    "experts, stored transposed": (
        lambda: Experts(transposed=True),
        {
            "gate_up_proj": "matrix stacked=1 split=2 transposed=True",
            "down_proj": "matrix stacked=1 transposed=True", "gate_up_proj_bias": "vector stacked=1 -",
        },
    ),
    "vision": (
        Vision,
        {
            "cls_token": "vector -", "pos_embed": "embedding", "gamma": "vector -", "depthwise.weight": "conv",
            "grouped.weight": "conv", "multiplied.weight": "conv", "time.weight": "conv",
            "up.weight": "conv transposed=True", "up_grouped.weight": "conv",
            "relative_position_bias_table": "vector -", "mixing": "?",
            **{f"{x}.bias": "vector -" for x in ("depthwise", "grouped", "multiplied", "time", "up", "up_grouped")},
            **{f"{x}.{y}": "vector -" for x in ("norm", "batch_norm", "over_two") for y in ("weight", "bias")},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_each_tensor_is_taken_for_what_it_is(name):
    make, expected = TABLES[name]
    assert taken(make()) == expected


@pytest.mark.parametrize("name", TABLES)
def test_the_groups_train_and_hold_every_parameter_once(name):
    model = TABLES[name][0]()
    groups = param_groups(model, lr=0.01)
    params = [p for group in groups for _, p in group["params"]]
    assert sorted(map(id, params)) == sorted(map(id, model.parameters()))
    optimizer = LearnedOptimizer(groups, backend="eager")
    before = [p.detach().clone() for p in params]
    run(optimizer, params, 2)
    assert all(not torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert set(optimizer.param_groups[0]["param_names"]) <= {name for name, _ in model.named_parameters()}
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}
    torch.optim.AdamW(param_groups(model)).step()  # others leave the keys alone


def test_a_class_head_is_a_matrix_and_a_vocabulary_is_none():
    def of(*shape):
        return taken(nn.Sequential(nn.Linear(8, 8), nn.Linear(*shape)))["1.weight"]

    assert [of(8, 10), of(8, 127), of(8, 128)] == ["matrix", "matrix", "head"]


def test_overrides_go_before_what_was_found():
    model = LanguageModel(tied=False)
    overrides = {
        "block.*": {"lr": 0.5},
        "block.c_attn.*": {"split": (8,) * 6, "weight_decay": 0.3},
        "head.*": {"role": None},
    }
    groups = param_groups(model, overrides=overrides, lr=0.1)
    by_name = {name: group for group in groups for name, _ in group["params"]}
    assert by_name["block.c_attn.weight"]["split"] == (8,) * 6
    assert [by_name[f"block.{x}.weight"]["lr"] for x in ("c_attn", "proj")] == [0.5, 0.5]
    assert by_name["block.c_attn.weight"]["weight_decay"] == 0.3
    assert "role" not in by_name["head.weight"]
    assert by_name["wte.weight"]["lr"] == 0.1
    with pytest.raises(ValueError, match=r"\['blocks.\*'\].*there are \['wte.weight'"):
        param_groups(model, overrides={"blocks.*": {}})


def test_what_is_no_model_and_what_has_no_shape_yet_is_refused():
    with pytest.raises(TypeError, match="takes a module, found list"):
        param_groups(list(nn.Linear(2, 2).parameters()))
    with pytest.raises(ValueError, match=r"\['weight', 'bias'\] have no shape yet"):
        param_groups(nn.LazyLinear(3))


def test_layers_may_get_their_shape_after_the_optimizer_is_made():
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(1, bias=False))
    optimizer = LearnedOptimizer(model.named_parameters())
    assert optimizer.summary().splitlines()[1:] == [
        "0.weight   not yet  unknown, has no shape yet  no              0.01",
        "0.bias     not yet  unknown, has no shape yet  no              0.01",
        "2.weight   not yet  unknown, has no shape yet  no              0.01",
    ]
    optimizer.step()  # as nothing has a gradient
    model(torch.randn(2, 8)).sum().backward()
    params, plain = list(model.parameters()), copies(model.parameters())
    for p, q in zip(params, plain, strict=True):
        q.grad = p.grad.clone()
    optimizer.step()
    LearnedOptimizer(plain).step()
    assert_same_bits(params, plain)
    assert optimizer.summary().splitlines()[1].startswith("0.weight   4×8    matrix")


@pytest.mark.parametrize("overrides", [{"weight": 3}, {"weight": {"params": []}}, [("weight", {})]], ids=str)
def test_overrides_that_are_none_are_refused(overrides):
    with pytest.raises(TypeError, match="Invalid overrides"):
        param_groups(nn.Linear(2, 2), overrides=overrides)


def test_a_tied_parameter_is_found_by_any_of_its_names():
    model = LanguageModel(tied=True)
    for name in ("wte.*", "head.*"):
        groups = param_groups(model, overrides={name: {"lr": 0.5}})
        assert [[name for name, _ in group["params"]] for group in groups if "lr" in group] == [["wte.weight"]]


@pytest.mark.parametrize("shape", [(16,), (0,), (3, 4, 4)])
def test_linear_layers_whose_weight_is_no_matrix_are_taken_by_their_shape(shape):
    odd = nn.Linear(4, 4)
    odd.weight = nn.Parameter(torch.ones(shape))
    expected = "vector -" if len(shape) == 1 else taken(nn.ParameterList([odd.weight]))["0"]
    assert taken(nn.Sequential(odd))["0.weight"] == expected
    assert taken(nn.Sequential(odd, nn.Linear(4, 4)))["0.weight"] == expected


@pytest.mark.parametrize(
    ("inputs", "queries", "keys", "split"),
    [(64, 64, 64, 3), (64, 64, 16, (64, 16, 16)), (64, 128, 32, (128, 32, 32))],  # the last: 192 = 3 * 64 outputs
)
def test_queries_keys_and_values_are_cut_by_the_heads_of_their_module(inputs, queries, keys, split):
    attention = nn.ModuleDict({"qkv_proj": nn.Linear(inputs, queries + 2 * keys, bias=False), "o": nn.Linear(2, 2)})
    attention.head_dim, attention.num_key_value_heads = 16, keys // 16
    assert param_groups(nn.Sequential(attention))[0]["split"] == split


@pytest.mark.parametrize(
    ("outputs", "sizes", "split"),
    [
        (192, {"head_dim": 16}, 12),
        (192, {"head_size": 32}, 6),
        (96, {"head_dim": 16, "num_heads": 4}, 6),  # four queries that share key and value
        (192, {"num_attention_heads": 4}, 12),
        (192, {"head_dim": 64, "num_heads": 1}, 3),
        (192, {"head_dim": 192}, None),  # nothing to cut
        (192, {"head_dim": 80}, None),
        (200, {"num_heads": 3}, None),
        (192, {"head_dim": 64.0, "num_heads": None}, None),
        (192, {}, None),
    ],
)
def test_what_is_packed_by_heads_is_cut_into_them(outputs, sizes, split):
    attention = nn.ModuleDict({"query_key_value": nn.Linear(64, outputs), "o": nn.Linear(2, 2)})
    for name, size in sizes.items():
        setattr(attention, name, size)
    by_name = taken(nn.Sequential(attention))
    expected = "" if split is None else f" split={split}"
    assert by_name["0.query_key_value.weight"] == f"matrix{expected}"
    assert by_name["0.query_key_value.bias"] == f"vector{expected} -"


class Mixer(nn.Module):
    """Mamba's as its authors wrote it, or one of another kind."""

    def __init__(self, outputs, x_proj, **sizes):
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(32, 4))
        self.in_proj, self.out_proj = nn.Linear(16, outputs, bias=False), nn.Linear(32, 16, bias=False)
        if x_proj:
            self.x_proj = nn.Linear(32, x_proj, bias=False)
        for name, size in {"d_inner": 32, "d_state": 4, "dt_rank": 2, **sizes}.items():
            setattr(self, name, size)


@pytest.mark.parametrize(
    ("mixer", "in_proj", "x_proj"),
    [
        ((64, 10, {}), " split=2", " split=(2, 4, 4)"),
        ((64, 12, {"dt_rank": 4}), " split=2", " split=3"),
        ((84, 0, {"ngroups": 2, "nheads": 4}), " split=(32, 32, 8, 8, 4)", None),
        ((64, 0, {}), "", None),  # Zamba's, whose halves take turns row by row
        ((70, 11, {}), "", ""),
        ((64, 10, {"d_inner": None, "d_state": 2.0}), "", ""),
    ],
)
def test_mambas_projections_are_cut_by_the_sizes_of_their_mixer(mixer, in_proj, x_proj):
    outputs, rows, sizes = mixer
    table = taken(nn.Sequential(Mixer(outputs, rows, **sizes)))
    assert table["0.in_proj.weight"] == f"matrix{in_proj}"
    assert table.get("0.x_proj.weight") == (None if x_proj is None else f"matrix{x_proj}")
    assert table["0.out_proj.weight"] == "matrix"


def test_a_model_that_names_no_head_has_none():
    class Base(nn.Sequential):
        def get_output_embeddings(self):
            raise NotImplementedError

    assert taken(Base(nn.Linear(4, 4)))["0.weight"] == "matrix"


def test_a_role_that_is_given_decides_on_weight_decay():
    overrides = {"weight": {"role": "vector"}, "bias": {"role": None}}
    assert [group["weight_decay"] for group in param_groups(nn.Linear(4, 4), overrides=overrides)] == [0.0, 0.0]
    overrides["weight"]["weight_decay"] = 0.3
    assert [group["weight_decay"] for group in param_groups(nn.Linear(4, 4), overrides=overrides)] == [0.3, 0.0]
    assert param_groups(nn.Linear(4, 4), overrides={"bias": {"role": "matrix"}})[0]["weight_decay"] == 0.01


def test_learning_rates_that_print_alike_stay_apart():
    rates = torch.tensor([0.001, 0.00100001], dtype=torch.float64)
    layers = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    groups = param_groups(layers, overrides={f"{i}.*": {"lr": rate} for i, rate in enumerate(rates)})
    assert [float(group["lr"]) for group in groups] == rates.tolist()


def test_marked_parameters_do_not_decay():
    model = nn.Linear(4, 4)
    model.weight._no_weight_decay = True
    assert taken(model) == {"weight": "vector -", "bias": "vector -"}


def test_plain_parameters_are_taken_by_their_shapes_as_ever():
    model = TABLES["torch's transformer"][0]()
    others = copies(list(model.parameters()))
    by_shape = LearnedOptimizer(model.parameters(), backend="eager")
    named = LearnedOptimizer([(str(i), p) for i, p in enumerate(others)], backend="eager")
    for optimizer, params in ((by_shape, list(model.parameters())), (named, others)):
        run(optimizer, params, 2)
    assert_same_bits(list(model.parameters()), others)
    assert all(not set(group) & set(KEYS) for group in by_shape.param_groups)


def test_the_summary_says_what_each_tensor_is_taken_for():
    model = nn.ModuleDict(
        {"words": nn.Embedding(7, 4), "attention": nn.MultiheadAttention(4, 1), "norm": nn.LayerNorm(4)}
    )
    lines = LearnedOptimizer(param_groups(model)).summary().splitlines()
    assert lines[0].split() == ["parameter", "shape", "taken", "for", "orthogonalised", "weight", "decay"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert rows["words.weight"] == ["7×4", "embedding", "no", "0.01"]
    assert rows["attention.in_proj_weight"] == ["12×4", "3", "×", "matrix", "4×4", "4×4", "0.01"]
    assert rows["norm.bias"] == ["4", "vector", "no", "0"]
    plain = LearnedOptimizer(
        [nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(64, 2, 3))], weight_decay=0.0
    ).summary()
    rows = [line.split() for line in plain.splitlines()[1:]]
    assert rows[0] == ["0.0", "scalar", "vector,", "by", "its", "shape", "no", "0"]
    assert rows[1] == ["0.1", "64×2×3", "conv,", "by", "its", "shape", "64×6", "0"]


@pytest.mark.parametrize(
    ("key", "meant"), [("splits", "split"), ("roles", "role"), ("weigth_decay", "weight_decay"), ("beta", "betas")]
)
def test_a_misspelt_key_is_warned_of(key, meant):
    with pytest.warns(UserWarning, match=f"{key!r}, which is not read: did you mean {meant!r}"):
        LearnedOptimizer([{"params": [nn.Parameter(torch.zeros(4, 4))], key: 0}])


def test_keys_of_others_are_left_alone():
    LearnedOptimizer([{"params": [nn.Parameter(torch.zeros(4, 4))], "name": "a", "lr_scale": 0.5, "initial_lr": 1.0}])


def _parametrized() -> nn.ModuleDict:
    layers = {
        "embed": weight_norm(nn.Embedding(300, 16)),
        "qkv": spectral_norm(nn.Linear(16, 48)),
        "up": weight_norm(nn.ConvTranspose2d(4, 6, 3)),
        "lstm": weight_norm(nn.LSTM(16, 8), "weight_hh_l0"),
        "c_attn": prune.l1_unstructured(nn.Linear(16, 48), "weight", 0.5),
        "old": nn.utils.spectral_norm(nn.Linear(8, 8)),
    }
    with pytest.warns(FutureWarning, match="weight_norm"):
        layers["older"] = nn.utils.weight_norm(nn.Linear(8, 8))
    return nn.ModuleDict({**layers, "head": weight_norm(nn.Linear(16, 300))})  # last, as a head is


def test_parametrized_layers_are_what_they_were_and_nothing_is_computed_to_see_it():
    model = _parametrized()
    before = [buffer.clone() for buffer in model.buffers()]
    roles = {
        name: (group.get("role"), group.get("split"), group.get("transposed"), group["weight_decay"])
        for group in param_groups(model) for name, _ in group["params"]
    }  # fmt: skip
    assert_same_bits(list(model.buffers()), before)  # spectral norms iterate when their weight is read
    new, magnitude = "parametrizations.weight.original", ("vector", None, None, 0.0)
    assert {name: role for name, role in roles.items() if "bias" not in name} == {
        f"embed.{new}1": ("embedding", None, None, 0.01),
        f"qkv.{new}": ("matrix", 3, None, 0.01),
        f"up.{new}1": ("conv", None, True, 0.01),
        "lstm.weight_ih_l0": ("matrix", 4, None, 0.01),
        "lstm.parametrizations.weight_hh_l0.original1": ("matrix", 4, None, 0.01),
        "c_attn.weight_orig": ("matrix", 3, None, 0.01),
        "old.weight_orig": ("matrix", None, None, 0.01),
        f"head.{new}1": ("head", None, None, 0.01),
        "older.weight_v": ("matrix", None, None, 0.01),
        **{f"{name}.{new}0": magnitude for name in ("embed", "up", "head")},
        "lstm.parametrizations.weight_hh_l0.original0": magnitude,
        "older.weight_g": magnitude,
    }
