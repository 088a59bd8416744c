"""Response generators: the training module's own generate, or the Hybrid Engine's replica.

Both implement DeepSpeed's RolloutEngine. DeepSpeed's own hybrid engine fits no model of
transformers 5. This one takes any causal language model of transformers: see replica.py and
decoding.py.
"""

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from deepspeed.runtime.rollout.base import (
    RolloutBatch,
    RolloutEngine,
    RolloutRequest,
    SamplingConfig,
)
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from dschat.engine.replica import MEMORY_SHARE, LoraMode, Replica, free_memory
from dschat.engine.split_check import check_split
from dschat.generation.cache_size import class_cache
from dschat.generation.cuda_graphs import GraphDecoder
from dschat.generation.decoding import (
    Decoded,
    GraphMismatch,
    eager_decode,
    padding_caveats,
    takes_graphs,
)
from dschat.generation.graph_slots import GraphSlotDecoder
from dschat.generation.sampling import eos_ids, keep_tokens, response_mask
from dschat.generation.slots import Prompts, SlotDecoder, SlotStats, takes_slots
from dschat.generation.tensor_parallel import TensorGroup, gather_prompts
from dschat.models.lora import expert_adapters
from dschat.models.structure import pretrained
from dschat.runtime import dist
from dschat.runtime.activity import part_of, report
from dschat.runtime.log import logger

GIB = 2**30


class Generator(RolloutEngine):
    """Samples answers with an actor engine's weights."""

    def __init__(self, engine):
        self.engine = engine
        for caveat in padding_caveats(pretrained(engine.module)):
            logger.warning(caveat)

    def decode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation: GenerationConfig
    ) -> Decoded:
        """Return responses [N, R] to left-padded prompts; N = B * num_return_sequences.

        Responses to one prompt are adjacent. Tokens after the first EOS of a row are arbitrary.

        Args:
            input_ids, attention_mask: [B, P].
        """
        raise NotImplementedError

    def decode_all(self, batches: list[Prompts], generation: GenerationConfig) -> list[Decoded]:
        """Return the responses to several batches of prompts, as ``decode`` does for one."""
        return decode_each(batches, partial(self.decode, generation=generation))

    def generate(self, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """Generate through DeepSpeed's interface; greedy at temperature 0.

        EOS and padding tokens come from the model's generation config.
        """
        own = self.engine.module.generation_config
        samples = sampling.n_samples_per_prompt
        # Greedy responses to one prompt are the same.
        copies = samples if sampling.temperature > 0 else 1
        eos = eos_ids(own)
        generation = GenerationConfig(
            do_sample=sampling.temperature > 0,
            temperature=sampling.temperature or 1.0,
            top_p=sampling.top_p,
            top_k=max(sampling.top_k, 0),
            max_new_tokens=sampling.max_new_tokens,
            num_return_sequences=copies,
            eos_token_id=eos,
            pad_token_id=next(iter(eos), 0) if own.pad_token_id is None else own.pad_token_id,
        )
        prompts, prompt_mask = request.prompt_ids, request.prompt_attention_mask
        tokens = self.decode(prompts, prompt_mask, generation).tokens
        tokens = tokens.repeat_interleave(samples // copies, dim=0)
        prompts = prompts.repeat_interleave(samples, dim=0)
        prompt_mask = prompt_mask.repeat_interleave(samples, dim=0)
        mask = response_mask(tokens, eos).to(prompt_mask.dtype)
        return RolloutBatch(
            torch.cat([prompts, tokens], -1),
            torch.cat([prompt_mask, mask], -1),
            torch.full((len(tokens),), prompts.shape[1], device=tokens.device),
        )

    def sync_weights(self, step: int) -> None:
        """Take the current weights. Does nothing if the training weights themselves generate."""

    def end_rollout(self) -> None:
        """Free what is not kept until the next rollout."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the last rollout."""
        return {}


class PlainGenerator(Generator):
    """transformers' generate on the training module.

    Simple, and slow under ZeRO-3. The Hybrid Engine is tested against it.
    """

    def decode(self, input_ids, attention_mask, generation) -> Decoded:
        """Generate responses as in Generator, without logprobs.

        Under ZeRO-3 all ranks step until the last one is done (synced_gpus).
        """
        self.engine.eval()
        with torch.no_grad(), _only(self.engine.module, generation):
            sequences = self.engine.module.generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                generation_config=generation,
                logits_processor=LogitsProcessorList([TokenReport(input_ids, generation)]),
                synced_gpus=self.engine.zero_optimization_stage() == 3 and dist.world_size() > 1,
            )
        return Decoded(sequences[:, input_ids.shape[1] :], None)


class TokenReport(LogitsProcessor):
    """A reporter of how many tokens transformers' generate has chosen; it changes no score."""

    def __init__(self, input_ids: torch.Tensor, generation: GenerationConfig):
        """Set the prompts [B, P] and the sampling settings."""
        self._num_prompt = input_ids.shape[1]
        self._num_new = generation.max_new_tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        report(token=(input_ids.shape[1] - self._num_prompt, self._num_new))
        return scores


def decode_each(batches: list[Prompts], decode: Callable[..., Decoded]) -> list[Decoded]:
    """Return the responses to each batch; what is reported meanwhile has the batch's number."""
    found = []
    for number, batch in enumerate(batches, 1):
        with part_of(batch=(number, len(batches))):
            found.append(decode(*batch))
    return found


class HybridEngine(Generator):
    """Generates with an inference replica of the actor."""

    name = "dschat_hybrid_engine"

    def __init__(
        self,
        engine,
        *,
        lora_mode: LoraMode = "auto",
        cuda_graph: bool = True,
        compiled: bool = True,
        unpin: bool = False,
        release_cache: bool = False,
        max_rows: int = 0,
        max_length: int = 0,
        group: TensorGroup | None = None,
        gather_layers: int = 1,
        slots: int = 0,
        cache_gib: float = 0.0,
    ):
        """
        Args:
            engine: the actor's training engine.
            lora_mode: how the replica applies adapters, see Replica.
            cuda_graph: on a GPU, replay decode steps as CUDA graphs.
            compiled: run those through torch.compile.
            unpin: free gathered and merged weights after each rollout.
            release_cache: free the key-value cache, those weights and the graphs after each
                rollout.
            max_rows: answers at a time, for the check of memory.
            max_length: tokens of the longest prompt and answer together, likewise.
            group: the ranks that generate together, each with a slice of the weights; needs ZeRO-3.
            gather_layers: decoder layers that are gathered at a time.
            slots: answers that decode together, refilled from a queue; 0: each batch by itself.
            cache_gib: GiB of key-value cache for all slots of this device; 0: as much as they need
                at their longest.

        Raises:
            ValueError: the copies and the cache do not fit into memory; the message says how much
                is missing and what frees it.
        """
        super().__init__(engine)
        self.unpin, self.release_cache = unpin, release_cache
        self.replica = Replica(
            engine, lora_mode=lora_mode, group=group, gather_layers=gather_layers
        )
        self.group = group
        self._is_checked = group is None
        self._warned = False
        self.refresh_s = 0.0
        self.slots = slots
        self._stats = SlotStats()
        self.cache_gib = cache_gib
        self._check_memory(slots or max_rows, max_length)
        # On a GPU, one of the two decodes: batches as they come, or all of them in slots.
        self._graphs: GraphDecoder | None = None
        self._slot_graphs: GraphSlotDecoder | None = None
        if cuda_graph and engine.device.type == "cuda":
            self._build_graphs(compiled, max_rows, max_length)
        logger.info(f"Hybrid Engine: {self._description()}")

    def _build_graphs(self, compiled: bool, max_rows: int, max_length: int) -> None:
        """Set up decoding by CUDA graphs, unless the model does not support it."""
        reason = takes_graphs(self.replica.model, windows=self.slots > 0)
        if reason is not None:
            logger.warning(f"Hybrid Engine: no CUDA graphs for {self._model_name}, since {reason}")
            return
        if compiled and self.group is not None:
            logger.info(
                "Hybrid Engine: decode steps are not compiled, since they hold the group's sums"
            )
            compiled = False
        if self.slots:
            self._slot_graphs = GraphSlotDecoder(
                self.replica.model,
                slots=self._group_slots,
                compiled=compiled,
                max_length=max_length,
                cache_tokens=self._cache_tokens(max_length),
                group=self.group,
            )
            return
        self._graphs = GraphDecoder(
            self.replica.model,
            compiled=compiled,
            max_rows=max_rows * (1 if self.group is None else self.group.size),
            max_length=max_length,
            group=self.group,
        )

    @property
    def _decoder(self) -> GraphDecoder | GraphSlotDecoder | None:
        """The decoder that replays CUDA graphs; None if decoding is eager."""
        return self._slot_graphs if self.slots else self._graphs

    @property
    def _model_name(self) -> str:
        """The class of the model, for messages."""
        return type(self.engine.module).__name__

    @property
    def _group_slots(self) -> int:
        """Slots of all ranks that generate together: each caches its part of the heads."""
        return self.slots * (1 if self.group is None else self.group.size)

    def _cache_tokens(self, length: int) -> int:
        """Return the tokens, in texts of `length`, whose keys and values take `cache_gib`; 0 if it
        is not given.

        A group of N ranks holds N times as many, each rank an Nth of the heads.
        """
        if not self.cache_gib:
            return 0
        length = max(length, 1)
        row = cache_bytes(self.engine.module, rows=1, length=length, itemsize=self.replica.itemsize)
        size = 1 if self.group is None else self.group.size
        return int(size * self.cache_gib * GIB / row * length)

    def decode(self, input_ids, attention_mask, generation) -> Decoded:
        """Generate responses as in Generator.

        Every rank must call it, since ZeRO-3's weights are gathered from all. Ranks of a group
        must pass the same number of rows.
        """
        return self.decode_all([(input_ids, attention_mask)], generation)[0]

    def decode_all(self, batches, generation) -> list[Decoded]:
        """Generate responses to several batches of prompts, as in Generator.

        With slots, the batches wait in one queue. Every rank must call it; ranks of a group with
        as many batches.
        """
        self.refresh_s += self.replica.refresh()
        with torch.no_grad():
            if self.group is None:
                return self._decode_batches(batches, generation)
            if not self._is_checked:
                check_split(self.engine, self.replica.model, self.group, *batches[0])
                self._is_checked = True
            batches = [gather_prompts(self.group, *batch) for batch in batches]
            return [self._own(found) for found in self._decode_batches(batches, generation)]

    def _own(self, decoded: Decoded) -> Decoded:
        """Return this rank's part of a group's responses."""
        parts = (decoded.tokens, decoded.logprobs)
        return Decoded(*(part.chunk(self.group.size)[self.group.index] for part in parts))

    def _decode_batches(self, batches, generation) -> list[Decoded]:
        """Return the responses to batches that are the same on all ranks of a group."""
        if self.slots == 0:
            return decode_each(batches, partial(self._decode, generation=generation))
        reason = takes_slots(self.replica.model, generation)
        if reason is None:
            return self._decode_in_slots(batches, generation)
        if not self._warned:
            self._warned = True
            logger.warning(
                f"Hybrid Engine: {self._model_name} decodes batch by batch in spite of "
                f"--generation_slots, since {reason}"
            )
        return decode_each(batches, partial(self._decode_eagerly, generation=generation))

    def _decode_in_slots(self, batches, generation) -> list[Decoded]:
        """Return the responses, decoded in slots; once more with half the slots if memory ends."""
        # From the generator that a checkpoint holds, so a resumed run draws the same seed.
        seed = int(torch.randint(2**62, ()))
        try:
            return self._run_slots(batches, generation, seed)
        except torch.OutOfMemoryError:
            # The other ranks of a group may have memory left, and would wait for this one.
            if self.slots == 1 or self.group is not None:
                raise
        # Outside of the handler, whose traceback would keep the buffers alive.
        self.slots = -(-self.slots // 2)
        logger.warning(
            f"Hybrid Engine: out of memory; trying again with {self.slots} slots. Give "
            f"--generation_slots {self.slots} to begin with that."
        )
        if self._slot_graphs is not None:
            self._slot_graphs.release()
            self._slot_graphs.slots = self.slots
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()
        return self._run_slots(batches, generation, seed)

    def _run_slots(self, batches, generation, seed: int) -> list[Decoded]:
        """Return the responses, decoded in slots: by graphs, unless they are off or fail."""
        if self._slot_graphs is not None:
            self._slot_graphs.addresses = self.replica.addresses()
            try:
                return self._finish(self._slot_graphs, batches, generation, seed)
            except GraphMismatch as mismatch:
                self._warn_of_mismatch(mismatch)
                self._drop_graphs()
        agree = keep_tokens if self.group is None else self.group.agree
        slots = self._group_slots
        if self.cache_gib:
            # Without graphs there are no pages: every slot holds its longest answer.
            length = max(ids.shape[1] for ids, _ in batches) + generation.max_new_tokens
            slots = max(1, min(slots, self._cache_tokens(length) // length))
        decoder = SlotDecoder(self.replica.model, slots=slots, agree=agree)
        return self._finish(decoder, batches, generation, seed)

    def _finish(self, decoder: SlotDecoder, batches, generation, seed: int) -> list[Decoded]:
        """Return the decoder's responses, and keep and log its counts."""
        decoded = decoder.decode(batches, generation, seed=seed)
        self._stats = decoder.stats
        logger.info(f"Hybrid Engine: {decoder.stats}")
        return decoded

    def _decode(self, input_ids, attention_mask, generation) -> Decoded:
        """Return the responses to prompts that are the same on all ranks of a group."""
        if self._graphs is not None:
            try:
                return self._graphs.decode(
                    input_ids, attention_mask, generation, self.replica.addresses()
                )
            except GraphMismatch as mismatch:
                self._warn_of_mismatch(mismatch)
                self._drop_graphs()
        return self._decode_eagerly(input_ids, attention_mask, generation)

    def _decode_eagerly(self, input_ids, attention_mask, generation) -> Decoded:
        """Return the responses, decoded without graphs."""
        agree = keep_tokens if self.group is None else self.group.agree
        return eager_decode(self.replica.model, input_ids, attention_mask, generation, agree)

    def _warn_of_mismatch(self, mismatch: GraphMismatch) -> None:
        logger.warning(
            f"Hybrid Engine: CUDA graphs are off for {self._model_name}, whose captured steps fail "
            f"or compute something else ({mismatch})"
        )

    def sync_weights(self, step: int) -> None:
        """Read the engine's weights again, also if they changed without an optimizer step."""
        self.refresh_s += self.replica.refresh(force=True)

    def end_rollout(self) -> None:
        """Free memory as --unpin_actor_parameters and --release_inference_cache ask."""
        if self.release_cache and self._decoder is not None:
            self._decoder.release()
        if self.unpin or self.release_cache:
            self.replica.release()
        if self.release_cache and self.engine.device.type == "cuda":
            torch.cuda.empty_cache()

    def metrics(self) -> dict[str, float]:
        """Return the seconds spent on weights and captures since the last call."""
        found = {"time/gather_s": self.refresh_s}
        self.refresh_s = 0.0
        if self._decoder is not None:
            found["time/capture_s"] = self._decoder.graphs.capture_s
            self._decoder.graphs.capture_s = 0.0
        if self.slots:
            found |= self._stats.metrics()
        return found

    def shutdown(self) -> None:
        """Free everything."""
        self._drop_graphs()
        self.replica.release()

    def _drop_graphs(self) -> None:
        if self._decoder is not None:
            self._decoder.undo()
        self._graphs = None
        self._slot_graphs = None

    def _description(self) -> str:
        """Return which weights generate and how they decode, for the log."""
        if self._decoder is None:
            return f"{self._weights_description()}; eager decoding"
        compiled = "compiled" if self._decoder.graphs.compiled else "not compiled"
        return f"{self._weights_description()}; CUDA graphs, {compiled}"

    def _weights_description(self) -> str:
        replica = self.replica
        size = f"{replica.copied_bytes / GIB:.2f} GiB"
        if self.group is not None:
            return (
                f"decoder layers split over groups of {self.group.size} ranks, embeddings, norms "
                f"and head whole, gathered from ZeRO-3 {replica.gather_layers} layers at a time, "
                f"{size} on every rank"
            )
        if replica.partitioned:
            return f"weights gathered from ZeRO-3, {size} on every rank"
        if replica.attached and replica.copied_bytes:
            return f"the training weights, LoRA attached, and merged copies of experts, {size}"
        if replica.attached:
            return "the training weights, LoRA attached"
        if replica.copied_bytes:
            return f"the training weights, and merged copies of adapted layers, {size}"
        return "the training weights"

    def _check_memory(self, rows: int, length: int) -> None:
        """Raise ValueError if the copies and a cache of `rows` x `length` tokens do not fit."""
        # A group of N ranks caches N times the rows, each rank an Nth of the heads.
        cache = cache_bytes(
            self.engine.module, rows=rows, length=length, itemsize=self.replica.itemsize
        )
        if self.cache_gib:
            cache = min(cache, int(self.cache_gib * GIB))
        copies, free = self.replica.copied_bytes, free_memory(self.engine.device)
        if copies + cache <= MEMORY_SHARE * free:
            return
        rows_flag = "--generation_slots" if self.slots else "--per_device_generation_batch_size"
        remedies = []
        if self.replica.partitioned:
            group_size = 1 if self.group is None else self.group.size
            remedies.append(f"give --inference_tp_size {2 * group_size}")
        elif copies and not self.replica.attached:
            remedies.append("give --hybrid_lora attach")
        if expert_adapters(self.engine.module):
            remedies.append("give --no_lora_experts")
        remedies += [f"lower {rows_flag}", "leave out --enable_hybrid_engine"]
        raise ValueError(
            f"--enable_hybrid_engine needs {(copies + cache) / GIB:.1f} GiB on each device: "
            f"{copies / GIB:.1f} for weights and {cache / GIB:.1f} for the key-value cache of "
            f"{rows} answers. {free / GIB:.1f} GiB are free. To make it fit, "
            f"{', or '.join(remedies)}."
        )


def cache_bytes(model: torch.nn.Module, *, rows: int, length: int, itemsize: int) -> int:
    """Return the bytes of the cache of `model` for `rows` texts of `length` tokens."""
    inner = pretrained(model)
    return itemsize * class_cache(type(inner), inner.config).elements(rows=rows, positions=length)


@contextlib.contextmanager
def _only(model, generation: GenerationConfig):
    """Make `generation` the model's own generation config inside the context.

    ``generate`` fills what is None from there (min_p, suppressed tokens and the like). Neither a
    model's defaults nor transformers' may change what is sampled.
    """
    own = model.generation_config
    model.generation_config = generation
    try:
        yield
    finally:
        model.generation_config = own
