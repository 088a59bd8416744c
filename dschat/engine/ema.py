"""An exponential moving average of the trained weights.

It is fp32. Each rank averages its pieces of the master weights.
"""

import torch
from deepspeed.utils import safe_get_local_fp32_param

from dschat.engine.zero import full_tensors, is_partitioned
from dschat.runtime import dist


class MovingAverage:
    """ema = decay * ema + (1 - decay) * weights, of an engine's trainable parameters.

    DeepSpeed's optimizers keep fp32 master weights, whole (ZeRO 0) or in pieces. Each rank averages
    the pieces that it owns, without communication. In half precision most of the average would be
    lost, since 1 - decay is below its resolution.
    """

    def __init__(self, engine, *, decay: float):
        self.engine, self.decay = engine, decay
        self._names = [name for name, p in engine.module.named_parameters() if p.requires_grad]
        self._pieces = {name: piece.detach().clone() for name, piece in self._masters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after an optimizer step."""
        for name, piece in self._masters():
            self._pieces[name].lerp_(piece.to(self._pieces[name].device), 1.0 - self.decay)

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Return this rank's flat pieces and the offset of each in its parameter.

        Whole parameters come from rank 0 alone.
        """
        if self.engine.zero_optimization_stage() == 0 and not dist.is_main():
            return {}, {"starts": {}}
        parameters = dict(self.engine.module.named_parameters())
        starts = {
            name: self._start(parameters[name], piece) for name, piece in self._pieces.items()
        }
        return {name: piece.flatten() for name, piece in self._pieces.items()}, {"starts": starts}

    @torch.no_grad()
    def restore(self, saved) -> None:
        """Restore the state that ``state`` returned, for any number of ranks.

        `saved` has ``of_rank`` and ``checkpoint.processes``.
        """
        parameters = dict(self.engine.module.named_parameters())
        ranks = list(range(saved.checkpoint.processes))
        if self.engine.zero_optimization_stage() == 0:
            ranks = ranks[:1]
        elif len(ranks) == dist.world_size():
            ranks = [dist.rank()]  # each rank's piece is the one that it saved
        for rank in ranks:
            tensors, values = saved.of_rank(rank)
            for name in tensors.keys() & self._pieces.keys():
                own = self._pieces[name].view(-1)
                own_start = self._start(parameters[name], self._pieces[name])
                other = tensors[name]
                other_start = values["starts"][name]
                # The two pieces overlap from low to high, counted in the flat parameter.
                low = max(own_start, other_start)
                high = min(own_start + len(own), other_start + len(other))
                if low < high:
                    overlap = other[low - other_start : high - other_start]
                    own[low - own_start : high - own_start] = overlap.to(own.device)

    def full_tensors(self) -> dict[str, torch.Tensor]:
        """Return the state dict of ``full_tensors``, with averages instead of trained weights.

        In the training weights' precision, on rank 0; {} on the others. All ranks must call it.
        """
        tensors = full_tensors(self.engine.module)
        parameters = dict(self.engine.module.named_parameters())
        for name in self._names:
            whole = self._whole(parameters[name], self._pieces.get(name))
            if dist.is_main():
                old = tensors[name]
                for alias in [key for key, tensor in tensors.items() if tensor is old]:
                    tensors[alias] = whole.to(old.dtype).cpu()
        return tensors

    def _masters(self):
        """Yield each trained parameter's name and its local fp32 piece [n] or whole tensor."""
        stage = self.engine.zero_optimization_stage()
        parameters = dict(self.engine.module.named_parameters())
        for name in self._names:
            parameter = parameters[name]
            if stage == 0:
                yield name, parameter  # stage 0 is fp32: half precision runs as stage 1
            elif stage == 3:
                yield name, safe_get_local_fp32_param(parameter).flatten()
            elif parameter._hp_mapping is not None:
                yield name, parameter._hp_mapping.get_hp_fragment()

    def _start(self, parameter: torch.Tensor, piece: torch.Tensor) -> int:
        """Return the offset of this rank's piece in the flat parameter."""
        stage = self.engine.zero_optimization_stage()
        if stage == 0:
            return 0
        if stage == 3:
            return dist.rank() * piece.numel()
        return parameter._hp_mapping.lp_fragment_address.start

    def _whole(self, parameter: torch.Tensor, piece: torch.Tensor | None) -> torch.Tensor:
        """Return the whole average of one parameter, on every rank."""
        stage = self.engine.zero_optimization_stage()
        if stage == 0:
            return piece
        if is_partitioned(parameter):
            pieces = dist.gather_rows(piece.to(self.engine.device)[:, None])  # interleaved by rank
            flat = pieces.view(-1, dist.world_size()).t().reshape(-1)
            return flat[: parameter.ds_numel].view(parameter.ds_shape)
        flat = torch.zeros(parameter.numel(), device=self.engine.device)
        if piece is not None:
            address = parameter._hp_mapping.lp_fragment_address
            flat[address.start : address.start + address.numel] = piece.to(flat.device)
        return dist.all_reduce(flat).view(parameter.shape)
