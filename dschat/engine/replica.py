"""The inference replica: a plain transformers module that generates with a training engine's weights.

It has the actor's class and configuration but no DeepSpeed hooks and no LoRA wrappers. Its weights are
- the training weights themselves, the same storage, where ZeRO 0 to 2 hold them whole and no adapter touches them;
- for adapted layers a merged copy W + s B A (rounded once; the training weights are never touched), or, attached, the
  shared W with the low-rank product beside it;
- copies gathered from the partitions under ZeRO-3, where merging is free; with a tensor-parallel group this rank's slices
  of them (tensor_parallel.py).
"""

import copy
import itertools
import time
from dataclasses import dataclass
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn

from dschat.engine.zero import gathered, is_partitioned
from dschat.generation.tensor_parallel import TensorGroup, split_layers
from dschat.models.lora import ADAPTER, lora_layers
from dschat.models.structure import decoder_layers
from dschat.runtime.log import logger

LoraMode = Literal["merge", "attach", "auto"]
MEMORY_SHARE = 0.9  # of the free memory, which copies and KV cache may take


@dataclass
class Weight:
    """One parameter of the replica and where it comes from."""

    module: nn.Module  # of the replica
    leaf: str
    source: torch.Tensor | None  # the training parameter; None where `base` has to be de-quantised
    base: nn.Module  # the training module that holds it
    lora: Optional[LoraLayer] = None  # the adapter to merge into it
    block: str = ""  # what is gathered together under ZeRO-3
    cut: Optional[int] = None  # the dimension of which the replica holds a slice
    group: Optional[TensorGroup] = None

    def parts(self) -> list[torch.Tensor]:
        """The training parameters that it is made of."""
        parts = list(self.base.parameters(recurse=False)) if self.source is None else [self.source]
        return parts + (
            [lora_matrix(self.lora, "A"), lora_matrix(self.lora, "B")]
            if self.lora is not None
            else []
        )

    @property
    def shape(self) -> torch.Size:
        return self.module._parameters[self.leaf].shape

    def write(self, buffer: torch.Tensor) -> None:
        """The current weight or this rank's slice of it, adapter merged, into `buffer`; the parts must be whole."""
        weight = self.base.dequantized_weight() if self.source is None else self.source.detach()
        if self.cut is not None:
            weight = self.group.slice(weight, self.cut)
        if self.lora is None:
            buffer.copy_(weight)
            return
        a, b = lora_matrix(self.lora, "A").detach(), lora_matrix(self.lora, "B").detach()
        # addmm accumulates in fp32 and rounds once.
        if self.lora.fan_in_fan_out:
            a, b = b.T, a.T
        if self.cut == 0:
            b = self.group.slice(b, 0)
        elif self.cut == 1:
            a = self.group.slice(a, 1)
        torch.addmm(weight.to(buffer.dtype), b, a, alpha=self.lora.scaling[ADAPTER], out=buffer)


class LowRankLinear(nn.Module):
    """W x + s B (A x), with W inside `base` and the matrices of an adapter: LoRA without a copy of W."""

    def __init__(self, base: nn.Module, lora: LoraLayer):
        super().__init__()
        self.base, self.scale = base, lora.scaling[ADAPTER]
        for name in ("A", "B"):
            self.register_parameter(name, shared(lora_matrix(lora, name)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Like the adapted layer: [..., in] to [..., out]."""
        return self.base(x) + self.scale * F.linear(F.linear(x, self.A), self.B)


def lora_matrix(layer: LoraLayer, name: str) -> nn.Parameter:
    """A [dim, in] or B [out, dim] of an adapted layer."""
    return getattr(layer, f"lora_{name}")[ADAPTER].weight


def shared(parameter: torch.Tensor) -> nn.Parameter:
    """A parameter without gradient over the same storage."""
    return nn.Parameter(parameter.detach(), requires_grad=False)


class Replica:
    """`model` generates with the weights that `engine` had at the last ``refresh``."""

    def __init__(
        self,
        engine,
        *,
        lora_mode: LoraMode = "auto",
        group: TensorGroup | None = None,
        gather_layers: int = 1,
    ):
        """
        Args:
            engine: the actor's training engine.
            lora_mode: merge: merged copies of adapted layers; attach: no copy, two small products a layer more;
                auto: merge where memory allows. Under ZeRO-3 everything is a copy, and merged.
            group: the ranks that hold a slice each; needs ZeRO-3.
            gather_layers: decoder layers gathered at a time under ZeRO-3.
        """
        self.engine, self.device, self.group, self.gather_layers = (
            engine,
            engine.device,
            group,
            gather_layers,
        )
        source = engine.module
        config = copy.deepcopy(source.config)
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("meta"),
        ):  # initialisation draws random numbers
            self.model = type(source)(config)
        self.model.eval().requires_grad_(False)
        self._layers = lora_layers(source)
        self.partitioned = any(is_partitioned(p) for p in source.parameters())
        assert self.partitioned or group is None, "a shared weight has no slices"
        self._cut = {} if group is None else split_layers(self.model, group)
        self._shared: list[Weight] = []
        self._copied: list[Weight] = []
        self._aliases: list[tuple[nn.Module, str, Weight]] = []
        self._collect(source)
        self._copy_buffers(source)
        self.attached = bool(self._layers) and not self.partitioned and self._attaches(lora_mode)
        if self.attached:
            self._attach()
        self._version = -1
        self._held = False
        self.hold_shared()

    def _collect(self, source: nn.Module) -> None:
        """Find the source of every parameter, once for tied ones, and sort into shared and copied."""
        prefix, _ = decoder_layers(source)
        seen: dict[int, Weight] = {}
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            path, _, leaf = name.rpartition(".")
            found = source.get_submodule(path)
            lora = self._layers.get(path) if leaf == "weight" else None
            base = found.base_layer if isinstance(found, LoraLayer) else found
            parameter = base._parameters.get(leaf)
            quantised = (
                parameter is None and leaf == "weight" and hasattr(base, "dequantized_weight")
            )
            assert parameter is not None or quantised, f"{name} of the replica has no source"
            module = self.model.get_submodule(path)
            if parameter is not None and id(parameter) in seen:
                self._aliases.append((module, leaf, seen[id(parameter)]))
                continue
            block = (
                ".".join(name.split(".")[: len(prefix.split(".")) + 1])
                if name.startswith(f"{prefix}.")
                else name
            )
            cut = self._cut.get((module, leaf))
            weight = Weight(module, leaf, parameter, base, lora, block, cut, self.group)
            if parameter is not None:
                seen[id(parameter)] = weight
            copied = self.partitioned or lora is not None or quantised
            (self._copied if copied else self._shared).append(weight)

    def _copy_buffers(self, source: nn.Module) -> None:
        """Buffers and plain tensors of modules (rotary frequencies and the like) off the meta device.

        load_state_dict would leave the non-persistent ones there. They are small, and copied, since a forward of the
        replica may change its own.
        """
        for path, module in self.model.named_modules():
            found = source.get_submodule(path)
            found = found.base_layer if isinstance(found, LoraLayer) else found
            for holder, other in ((module._buffers, found._buffers), (vars(module), vars(found))):
                for name, tensor in list(holder.items()):
                    if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                        holder[name] = other[name].detach().clone()

    @property
    def copied_bytes(self) -> int:
        """Bytes of the copies that ``refresh`` fills."""
        return self.itemsize * sum(weight.shape.numel() for weight in self._copied)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight or of a number in the key-value cache."""
        return next(
            p for p in self.engine.module.parameters() if p.is_floating_point()
        ).element_size()

    def _attaches(self, lora_mode: LoraMode) -> bool:
        if lora_mode != "auto":
            return lora_mode == "attach"
        free = free_memory(self.device)
        attaches = self.copied_bytes > MEMORY_SHARE * free
        if attaches:
            logger.info(
                f"Hybrid Engine: merged copies take {self.copied_bytes / 2**30:.1f} GiB of {free / 2**30:.1f} GiB "
                "free: LoRA is attached instead (--hybrid_lora merge overrides)"
            )
        return attaches

    def _attach(self) -> None:
        for weight in [w for w in self._copied if w.lora is not None and w.source is not None]:
            path = next(
                name for name, module in self.model.named_modules() if module is weight.module
            )
            parent, _, leaf = path.rpartition(".")
            attached = LowRankLinear(weight.module, weight.lora)
            setattr(self.model.get_submodule(parent), leaf, attached)
            self._copied.remove(weight)
            self._shared.append(Weight(weight.module, weight.leaf, weight.source, weight.base))
            # The adapter's matrices are shared like W, and followed like it where their storage moves.
            self._shared += [
                Weight(attached, n, lora_matrix(weight.lora, n), weight.base) for n in ("A", "B")
            ]

    def hold_shared(self) -> None:
        """Point the shared weights at the training weights' storage; again where that has moved."""
        for weight in self._shared:
            if weight.module._parameters[weight.leaf].data_ptr() != weight.source.data_ptr():
                weight.module._parameters[weight.leaf] = shared(weight.source)
        self._tie()

    def _tie(self) -> None:
        for module, leaf, weight in self._aliases:
            module._parameters[leaf] = weight.module._parameters[weight.leaf]

    def refresh(self, *, force: bool = False) -> float:
        """Bring the replica to the engine's weights; returns the seconds of it. All ranks must call it.

        Copies are made only where an optimizer step has gone by since the last call, they were freed, or `force`.
        """
        started = time.monotonic()
        self.hold_shared()
        if not self._copied or (
            self._held and self._version == self.engine.global_steps and not force
        ):
            return time.monotonic() - started
        if not self._held:
            self._allocate()
        with torch.no_grad():
            for weights in self._gathers():
                with gathered([part for weight in weights for part in weight.parts()]):
                    for weight in weights:
                        weight.write(weight.module._parameters[weight.leaf])
        self._version = self.engine.global_steps
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic() - started

    def _gathers(self) -> list[list[Weight]]:
        """The copied weights by what is gathered at a time: so many decoder layers, and each of the others alone."""
        blocks: dict[str, list[Weight]] = {}
        for weight in self._copied:
            blocks.setdefault(weight.block, []).append(weight)
        prefix, _ = decoder_layers(self.model)
        layers = [weights for block, weights in blocks.items() if block.startswith(f"{prefix}.")]
        others = [
            weights for block, weights in blocks.items() if not block.startswith(f"{prefix}.")
        ]
        starts = range(0, len(layers), self.gather_layers)
        return others + [list(itertools.chain(*layers[i : i + self.gather_layers])) for i in starts]

    def _allocate(self) -> None:
        for weight in self._copied:
            dtype = (weight.parts()[-1] if weight.source is None else weight.source).dtype
            empty = torch.empty(weight.shape, dtype=dtype, device=self.device)
            weight.module._parameters[weight.leaf] = nn.Parameter(empty, requires_grad=False)
        self._tie()
        self._held = True

    def release(self) -> None:
        """Free the copies; the next ``refresh`` makes them again, at other addresses."""
        for weight in self._copied:
            hollow = torch.empty(
                weight.shape, dtype=weight.module._parameters[weight.leaf].dtype, device="meta"
            )
            weight.module._parameters[weight.leaf] = nn.Parameter(hollow, requires_grad=False)
        self._tie()
        self._held = False

    def addresses(self) -> tuple[int, ...]:
        """Return the addresses of all weights. A CUDA graph is valid only for those it was captured with."""
        return tuple(p.data_ptr() for p in self.model.parameters())


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on the device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    import psutil

    return psutil.virtual_memory().available
