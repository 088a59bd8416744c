"""The inference replica: a plain transformers module that generates with the training weights.

It has the actor's class and configuration, but no DeepSpeed hooks and no LoRA wrappers.

| weights | what the replica holds |
|-|-|
| ZeRO 0 to 2, no adapter | the training weights themselves, in the same storage |
| ZeRO 0 to 2, adapter, merged | a copy W + s B A, rounded once; W itself is never written |
| ZeRO 0 to 2, adapter, attached | the shared W, and the low-rank product next to it |
| ZeRO-3 | copies gathered from the partitions, adapters merged |
| ZeRO-3, a tensor-parallel group | this rank's slices of those copies (tensor_parallel.py) |
"""

import copy
import time
from dataclasses import dataclass
from typing import Literal, Optional

import psutil
import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from dschat.engine.quantized import QuantizedLinear
from dschat.engine.zero import gathered, is_partitioned
from dschat.generation.tensor_parallel import TensorGroup, split_layers
from dschat.models.lora import (
    ADAPTER,
    adapted_name,
    lora_layers,
    low_rank_update,
    plain_name,
)
from dschat.models.new_tokens import copy_new_tokens
from dschat.models.structure import decoder_layers
from dschat.runtime.log import logger

LoraMode = Literal["merge", "attach", "auto"]
MEMORY_SHARE = 0.9  # the part of the free memory that copies and key-value cache may take


@dataclass
class Weight:
    """One parameter of the replica and its source in the training module.

    Attributes:
        module: the replica's module that holds the parameter.
        leaf: the parameter's name in that module.
        source: the training parameter; None if `base` stores it quantized.
        base: the training module that holds the source.
        lora: the adapter to merge into the copy, if any.
        block: the name of the parameters that are gathered together under ZeRO-3.
        cut: the dimension of which the replica holds a slice; None: it holds the whole.
        group: the ranks that hold a slice each.
    """

    module: nn.Module
    leaf: str
    source: torch.Tensor | None
    base: nn.Module
    lora: Optional[LoraLayer] = None
    block: str = ""
    cut: Optional[int] = None
    group: Optional[TensorGroup] = None

    def parts(self) -> list[torch.Tensor]:
        """Return the training parameters from which the weight is computed."""
        parts = [self.source]
        if self.source is None:
            parts = list(self.base.parameters(recurse=False))
        if self.lora is not None:
            parts += [lora_matrix(self.lora, "A"), lora_matrix(self.lora, "B")]
        return parts

    @property
    def shape(self) -> torch.Size:
        """The shape of the replica's parameter: the slice's, if it holds one."""
        return self.module._parameters[self.leaf].shape

    def write(self, buffer: torch.Tensor) -> None:
        """Write the current weight, or this rank's slice of it, to `buffer`.

        The adapter is merged. The parts must be gathered before.
        """
        weight = self.base.dequantized_weight() if self.source is None else self.source.detach()
        if self.cut is not None:
            weight = self.group.slice(weight, self.cut)
        if self.lora is None:
            buffer.copy_(weight)
            return
        a, b = lora_matrix(self.lora, "A").detach(), lora_matrix(self.lora, "B").detach()
        if isinstance(self.lora, ParamWrapper):
            update = low_rank_update(self.lora, a.float(), b.float(), shape=weight.shape)
            buffer.copy_(weight.float() + update)
            return
        if self.lora.fan_in_fan_out:
            a, b = b.T, a.T
        if self.cut == 0:
            b = self.group.slice(b, 0)
        elif self.cut == 1:
            a = self.group.slice(a, 1)
        # addmm accumulates in fp32 and rounds once.
        torch.addmm(weight.to(buffer.dtype), b, a, alpha=self.lora.scaling[ADAPTER], out=buffer)


class LowRankLinear(nn.Module):
    """LoRA without a copy of W: W x + s B (A x), with W in `base` and the adapter's A and B."""

    def __init__(self, base: nn.Module, lora: LoraLayer):
        super().__init__()
        self.base = base
        self.scale = lora.scaling[ADAPTER]
        for name in ("A", "B"):
            self.register_parameter(name, shared(lora_matrix(lora, name)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out], as the adapted layer does."""
        return self.base(x) + self.scale * F.linear(F.linear(x, self.A), self.B)


def lora_matrix(layer: LoraLayer, name: str) -> nn.Parameter:
    """Return the matrix A [dim, in] or B [out, dim] of an adapted layer."""
    return getattr(layer, f"lora_{name}")[ADAPTER].weight


def shared(parameter: torch.Tensor) -> nn.Parameter:
    """Return a parameter without gradient over the same storage."""
    return nn.Parameter(parameter.detach(), requires_grad=False)


class Replica:
    """A module, `model`, that generates with the weights of `engine` at the last ``refresh``."""

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
            lora_mode: "merge": merged copies of adapted layers; "attach": no copies, but two more
                small products per layer; "auto": merge if the copies fit. Under ZeRO-3 all weights
                are merged copies.
            group: the ranks that hold a slice each; needs ZeRO-3.
            gather_layers: decoder layers gathered at a time under ZeRO-3.
        """
        self.engine = engine
        self.device = engine.device
        self.group = group
        self.gather_layers = gather_layers
        source = engine.module
        config = copy.deepcopy(source.config)
        # Initialization draws random numbers: leave the run's generator as it was.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            self.model = type(source)(config)
        copy_new_tokens(source, self.model)
        self.model.eval().requires_grad_(False)
        # Without the wrappers of adapters: the module inside has the same plain name, and is later.
        self._modules = {plain_name(name): module for name, module in source.named_modules()}
        self._layers = {
            adapted_name(name, layer): layer for name, layer in lora_layers(source).items()
        }
        self.partitioned = any(is_partitioned(p) for p in source.parameters())
        assert self.partitioned or group is None, "a shared weight has no slices"
        self._cut = {} if group is None else split_layers(self.model, group)
        self._shared: list[Weight] = []
        self._copied: list[Weight] = []
        self._aliases: list[tuple[nn.Module, str, Weight]] = []
        self._collect(source)
        self._copy_buffers()
        self.attached = bool(self._layers) and not self.partitioned and self._attaches(lora_mode)
        if self.attached:
            self._attach()
        self._version = -1
        self._held = False
        self.hold_shared()

    def _collect(self, source: nn.Module) -> None:
        """Find the source of every parameter, and sort the parameters into shared and copied.

        Tied parameters have one source; the others of them are aliases.
        """
        prefix, _ = decoder_layers(source)
        seen: dict[int, Weight] = {}
        for name, _ in self.model.named_parameters(remove_duplicate=False):
            path, _, leaf = name.rpartition(".")
            lora = self._layers.get(name)
            base = self._modules[path]
            parameter = base._parameters.get(leaf)
            is_quantized = (
                parameter is None and leaf == "weight" and hasattr(base, "dequantized_weight")
            )
            assert parameter is not None or is_quantized, f"{name} of the replica has no source"
            module = self.model.get_submodule(path)
            if parameter is not None and id(parameter) in seen:
                self._aliases.append((module, leaf, seen[id(parameter)]))
                continue
            block = name
            if name.startswith(f"{prefix}."):
                block = ".".join(name.split(".")[: len(prefix.split(".")) + 1])
            cut = self._cut.get((module, leaf))
            weight = Weight(module, leaf, parameter, base, lora, block, cut, self.group)
            if parameter is not None:
                seen[id(parameter)] = weight
            if self.partitioned or lora is not None or is_quantized:
                self._copied.append(weight)
            else:
                self._shared.append(weight)

    def _copy_buffers(self) -> None:
        """Copy buffers and plain tensors of modules, such as rotary frequencies.

        They are on the meta device until then. They are small, and not shared, since a forward pass
        may change them. load_state_dict would leave out the non-persistent ones.
        """
        for path, module in self.model.named_modules():
            found = self._modules[path]
            for holder, other in ((module._buffers, found._buffers), (vars(module), vars(found))):
                for name, tensor in list(holder.items()):
                    if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                        holder[name] = other[name].detach().clone()

    @property
    def copied_bytes(self) -> int:
        """Bytes of the copies that ``refresh`` writes."""
        return self.itemsize * sum(weight.shape.numel() for weight in self._copied)

    @property
    def itemsize(self) -> int:
        """Bytes of a weight, or of a number in the key-value cache."""
        weights = self.engine.module.parameters()
        return next(w for w in weights if w.is_floating_point()).element_size()

    def _attaches(self, lora_mode: LoraMode) -> bool:
        """Return whether adapters are attached, and not merged: in "auto", if copies do not fit."""
        if lora_mode != "auto":
            return lora_mode == "attach"
        free = free_memory(self.device)
        attaches = self.copied_bytes > MEMORY_SHARE * free
        if attaches:
            logger.info(
                f"Hybrid Engine: LoRA is attached, since merged copies would take "
                f"{self.copied_bytes / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free. Give "
                "--hybrid_lora merge to merge all the same."
            )
        return attaches

    def _attach(self) -> None:
        """Replace each adapted layer by a LowRankLinear over the shared weight.

        A quantized weight stays packed and is de-quantized in every product: slower, without copy.
        Experts are merged copies all the same.
        """
        adapted = [
            w for w in self._copied if w.lora is not None and not isinstance(w.lora, ParamWrapper)
        ]
        for weight in adapted:
            path = next(
                name for name, module in self.model.named_modules() if module is weight.module
            )
            parent, _, leaf = path.rpartition(".")
            base = weight.module if weight.source is not None else self._share_packed(weight)
            attached = LowRankLinear(base, weight.lora)
            setattr(self.model.get_submodule(parent), leaf, attached)
            self._copied.remove(weight)
            if weight.source is not None:
                self._shared.append(Weight(weight.module, weight.leaf, weight.source, weight.base))
            # The adapter's matrices are shared as W is: hold_shared follows them if they move.
            for name in ("A", "B"):
                matrix = lora_matrix(weight.lora, name)
                self._shared.append(Weight(attached, name, matrix, weight.base))

    def _share_packed(self, weight: Weight) -> QuantizedLinear:
        """Return a layer over the packed weight, and the bias, of a quantized training layer."""
        source = weight.base
        layer = QuantizedLinear(
            shared(source.packed), None, like=weight.module, dtype=source.dtype, kind=source.kind
        )
        self._shared.append(Weight(layer, "packed", source.packed, source))
        for other in self._shared:
            if other.module is weight.module and other.leaf == "bias":
                layer.bias = shared(other.source)
                other.module = layer
        return layer

    def hold_shared(self) -> None:
        """Point the shared weights at the training weights' storage, if they do not yet.

        Offloading, for example, moves the training weights to other storage.
        """
        for weight in self._shared:
            if weight.module._parameters[weight.leaf].data_ptr() != weight.source.data_ptr():
                weight.module._parameters[weight.leaf] = shared(weight.source)
        self._tie()

    def _tie(self) -> None:
        """Give tied parameters the tensor of their first name."""
        for module, leaf, weight in self._aliases:
            module._parameters[leaf] = weight.module._parameters[weight.leaf]

    def refresh(self, *, force: bool = False) -> float:
        """Update the replica to the engine's current weights. All ranks must call it.

        Copies are written only if an optimizer step was taken since the last call, if they were
        freed, or with `force`.

        Returns:
            The seconds that it took.
        """
        started = time.monotonic()
        self.hold_shared()
        is_current = self._held and self._version == self.engine.global_steps and not force
        if not self._copied or is_current:
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
        """Return the copied weights, one list for each gather.

        `gather_layers` decoder layers are gathered at a time, and every other block alone.
        """
        blocks: dict[str, list[Weight]] = {}
        for weight in self._copied:
            blocks.setdefault(weight.block, []).append(weight)
        prefix, _ = decoder_layers(self.model)
        layers, gathers = [], []
        for block, weights in blocks.items():
            if block.startswith(f"{prefix}."):
                layers.append(weights)
            else:
                gathers.append(weights)
        for start in range(0, len(layers), self.gather_layers):
            together = layers[start : start + self.gather_layers]
            gathers.append([weight for weights in together for weight in weights])
        return gathers

    def _allocate(self) -> None:
        """Allocate the copies, in the dtype of their source."""
        for weight in self._copied:
            source = weight.parts()[-1] if weight.source is None else weight.source
            dtype = source.dtype
            empty = torch.empty(weight.shape, dtype=dtype, device=self.device)
            weight.module._parameters[weight.leaf] = nn.Parameter(empty, requires_grad=False)
        self._tie()
        self._held = True

    def release(self) -> None:
        """Free the copies. The next ``refresh`` allocates them again, at other addresses."""
        for weight in self._copied:
            dtype = weight.module._parameters[weight.leaf].dtype
            empty = torch.empty(weight.shape, dtype=dtype, device="meta")
            weight.module._parameters[weight.leaf] = nn.Parameter(empty, requires_grad=False)
        self._tie()
        self._held = False

    def addresses(self) -> tuple[int, ...]:
        """Return the addresses of all weights.

        A CUDA graph is valid only for the addresses that it was captured with.
        """
        return tuple(p.data_ptr() for p in self.model.parameters())


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on the device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available
