"""The policy: the weights of the learned update rule, and the frozen configuration that goes with them.

The policy is two small networks. A *tensor head* sees a tensor's context (see :mod:`learned_optim.rule.context`) once
per step and sets the tensor's step size and mixture. A *recurrent cell*, the same for every coordinate of every tensor,
sees a coordinate's features and keeps that coordinate's hidden state. What is done with their outputs stands in
:mod:`learned_optim.rule.update`, and only there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from learned_optim.policy.files import pack, write
from learned_optim.policy.fingerprint import fingerprint
from learned_optim.policy.hub import PullOptions, publish
from learned_optim.policy.resolve import refuse_revision, resolve
from learned_optim.rule.cells import CELLS
from learned_optim.rule.config import PolicyConfig

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

#: Meta-parameters by the part of the rule they belong to: gradient estimators learn one part or several.
PARTS = {
    "pace": ("pace",),
    "age": ("age",),
    "decay": ("decay",),
    "step_size": ("head",),  # in one direction of its outputs only, as the two that follow
    "averaging": ("head",),
    "caution": ("head",),
    "tensor_head": ("head",),
    "gates": ("gate_context", "gate_features"),
    "amplitude": ("amplitude",),
    "gru": ("gru_input", "gru_hidden", "gru_bias", "gru_output"),
}


class Policy(nn.Module):
    """The meta-parameters of the update rule, as made by :func:`learned_optim.meta_train` or loaded.

    ===============  ==================  =======================================================
    weight           shape               what it does
    ===============  ==================  =======================================================
    head             [outputs, context]  step size, mixture and caution of a tensor
    pace             [1, context]        what a tensor's step size grows or shrinks by (where ``pace_rate`` is not 0)
    age              [1, context]        when the problem counts as new (where ``age_rate`` is not 0)
    decay            [1, context]        weight decay beside the user's (where ``decay_rate`` is not 0)
    gate_context     [hidden, context]   shifts a tensor's gates (gated cell)
    gate_features    [hidden, features]  shifts a coordinate's gates (gated cell)
    amplitude        [features]          shifts a coordinate's amplitude (gated cell)
    gru_*            ...                 the GRU's weights (GRU cell)
    ===============  ==================  =======================================================

    All start at zero (the rule then is the config's base mixture), except the GRU's recurrent weights, which
    start at random.

    Args:
        config: the architecture and the base mixture; ``PolicyConfig()`` if ``None``.
        generator: source of the GRU's random start; ``None`` takes torch's global one.
        source: where the weights came from, for messages and fingerprints.
    """

    def __init__(
        self, config: PolicyConfig | None = None, *, generator: torch.Generator | None = None, source: str = "new"
    ) -> None:
        super().__init__()
        self.config = config or PolicyConfig()
        self.source = source
        self.results: dict[str, Any] | None = None
        for name, shape in self.config.weight_shapes().items():
            weight = torch.zeros(shape, dtype=torch.float32, device="cpu")  # whatever torch's defaults are
            if name in CELLS[self.config.cell].random_weights:
                weight.normal_(0.0, 1.0 / math.sqrt(shape[-1]), generator=generator)
            self.register_parameter(name, nn.Parameter(weight))

    def weights(self) -> dict[str, Tensor]:
        """The weights by name, as the update rule takes them; with their graph, if they have one."""
        return dict(self.named_parameters())

    def fingerprint(self) -> str:
        """``sha256:`` and 16 hexadecimal digits over configuration and weights: equal if and only if the rule is."""
        return fingerprint(self.config, self.weights())

    def extra_repr(self) -> str:
        count = sum(w.numel() for w in self.parameters())
        return f"cell={self.config.cell!r}, meta_parameters={count}, source={self.source!r}, {self.fingerprint()}"

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path | Policy,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
    ) -> Policy:
        """Load a policy: bundled, from a folder, or from the Hub. The first of these that fits wins:

        1. a ``Policy``, returned as it is;
        2. a folder, if the name is a ``pathlib.Path`` or starts (or ends) like one: ``./run``, ``../run``, ``~/run``;
        3. a bundled policy: ``"default"``;
        4. a folder that exists and holds a ``config.json``: ``"run/best"``. It wins over a repository of that name;
        5. a Hub repository: ``"owner/name"`` or ``"owner/name@revision"``.

        ``policy.source`` says which it was: ``bundled:default``, the folder as it was given, or ``owner/name@`` and
        the hash of the commit to which a repository is pinned. If the Hub cannot be reached and the revision was
        pulled before, the copy in the cache is used, with a ``CachedPolicyWarning`` that names its commit.

        Args:
            name_or_path: what to load.
            revision: branch, tag or commit of a repository; ``None`` is its main branch. Nothing else has revisions.
            cache_dir: where downloads are kept; ``None`` is huggingface_hub's cache (``HF_HOME``).
            token: a Hub token; ``None`` is ``HF_TOKEN`` or the stored login, ``False`` sends none.
            local_files_only: use the cache, open no connection. ``HF_HUB_OFFLINE=1`` does the same.
            force_download: download again what is in the cache, in case it was damaged there.

        Raises:
            PolicyNotFoundError: no such folder, repository or revision, a file missing, or not in the cache.
            UnknownPolicyError: a name that is nothing of the above; the message lists the bundled policies.
            InvalidPolicyError: damaged, incomplete, foreign, or made for a newer version.
            HubPermissionError: gated or refused.
            HubConnectionError: not reachable, too slow, failing.
            ValueError: ``revision`` for what has none, or two different ones.
            TypeError: ``name_or_path`` is of another type.
        """
        if isinstance(name_or_path, Policy):
            refuse_revision(revision, "a Policy object")
            return name_or_path
        options = PullOptions(cache_dir, token, local_files_only, force_download)
        stored = resolve(name_or_path, revision, options)
        # A generator of its own: a GRU starts at random before it is overwritten; the global one must not move.
        policy = cls(stored.config, source=stored.source, generator=torch.Generator())
        policy.load_state_dict(stored.weights)
        policy.results = stored.results
        return policy

    def save_pretrained(self, folder: str | Path, results: Mapping[str, Any] | None = None) -> None:
        """Write ``model.safetensors``, ``config.json``, ``README.md`` and, if there are any, ``results.json``.

        Every file is replaced atomically and the configuration, which holds the checksums of the others, comes after
        them: a folder whose writing was interrupted is refused on loading. Other files in the folder are left alone.

        Args:
            folder: where to; made if it does not exist.
            results: what was measured (see :mod:`learned_optim.policy.results`); ``policy.results`` if ``None``.

        Raises:
            ValueError: weights that are not finite float32 of the configuration's shapes, or results that are not plain
                JSON: they could not be loaded again.
            OSError: the folder cannot be written.
        """
        write(self._packed(results), Path(folder).expanduser())

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Publish the policy in a Hub repository, in one commit, with its results and a model card made from them.

        Args:
            repo_id: ``owner/name``; made if it does not exist.
            private: whether a new repository is private; ``None`` is the owner's default. An existing one stays as it
                is.
            token: a Hub token with the right to write; ``None`` is ``HF_TOKEN`` or the stored login.
            commit_message: ``None`` names the policy's fingerprint.
            revision: branch to commit to, made if it does not exist; ``None`` is the main branch.
            create_pr: open a pull request against ``revision`` instead of committing to it.

        Returns:
            What ``huggingface_hub`` says about the commit: ``oid`` is its hash, ``pr_revision`` the pull request's.

        Raises:
            ValueError: ``repo_id`` is none, or the policy cannot be stored.
            HubPermissionError: not logged in, token refused, no right to write there.
            PolicyNotFoundError: no such repository or revision, and none could be made.
            HubConnectionError: offline, not reachable, failing.
        """
        return publish(
            self._packed(repo_id=repo_id), repo_id, private=private, token=token, revision=revision,
            commit_message=commit_message or f"learned-optim policy {self.fingerprint()}", create_pr=create_pr,
        )  # fmt: skip

    def _packed(self, results: Mapping[str, Any] | None = None, repo_id: str | None = None) -> dict[str, bytes]:
        results = self.results if results is None else results
        return pack(self.config, self.weights(), results, repo_id=repo_id)


def as_policy(policy: str | Path | Policy, revision: str | None) -> Policy:
    """What the arguments of :class:`learned_optim.LearnedOptimizer` name, as a copy of its own.

    An optimizer runs the rule whose fingerprint its checkpoints name, whatever becomes of a Policy that it was given.

    Raises:
        TypeError: of another type.
        ValueError: a revision beside a Policy; besides, the errors of :meth:`Policy.from_pretrained`.
    """
    if not isinstance(policy, str | Path | Policy):
        raise TypeError(f"policy must be a name, a folder, a Hub id or a Policy, found {type(policy).__name__}")
    if isinstance(policy, Policy):
        if revision is not None:
            raise ValueError("revision goes with a Hub id, found it beside a Policy object")
        return copy.deepcopy(policy)
    return Policy.from_pretrained(policy) if revision is None else Policy.from_pretrained(policy, revision=revision)
