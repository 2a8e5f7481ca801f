"""One network under DeepSpeed ZeRO. Only this module uses DeepSpeed's API.

A GAN needs two engines in one process. These rules prevent mistakes that give wrong gradients instead of an error:

* The network is called as `engine.module(...)`, never as `engine(...)`, which fails for some pairs of stages.
  `NetworkEngine.backward` announces a new backward pass to ZeRO, as `engine(...)` would. Without the announcement, the
  gradients of an LSTM's second micro-batch are silently wrong at stage 2 (DeepSpeed 0.19.8).
* A network is frozen while only the other network's loss is computed, so that the frozen network's ZeRO hooks do not
  collect the gradient of this loss.
* There is one `backward` per micro-batch, so losses are summed first. At stages 1 to 3, a second `backward` would
  silently give wrong gradients.

State is saved and restored as full fp32 tensors by parameter name, so runs resume at any world size, stage or
precision.

Undocumented parts of the libraries that this package uses (tested by `tests/distributed/test_deepspeed_internals.py`):

    deepspeed   deepspeed.ops.__compatible_ops__        switches the shared-memory collectives off
    deepspeed   optimizer.clear_backward_seen_flag      announces a new backward (stages 1 to 3)
    deepspeed   optimizer.bit16_groups                  parameters of each flat master (stages 1 and 2)
    deepspeed   optimizer.fp16_groups                   parameters of each flat master (stage 3)
    deepspeed   optimizer.single_partition_of_fp32_groups, .fp32_partitioned_groups_flat    this rank's flat masters
    deepspeed   parameter._hp_mapping                   a parameter's piece of a flat master (stages 1 and 2)
    deepspeed   optimizer.grad_position, .get_param_id  a parameter's piece of a flat master (stage 3)
    deepspeed   parameter.ds_shape, .ds_numel, .ds_tensor    a split parameter (stage 3)
    deepspeed   optimizer._lazy_init_hp_params_optimizer_state    makes moments known to `safe_get_full_optimizer_state`
    deepspeed   optimizer.loss_scaler, engine.skipped_steps       counters of fp16
    torch       torch.cpu._is_avx512_bf16_supported, ._is_amx_tile_supported, torch.ops.mkldnn._is_mkldnn_fp16_supported
    torch       TORCHDYNAMO_DISABLE                     makes torch.compile return functions unchanged
    torch       AdamW.step goes through self.param_groups    (optimizer.py)
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_t2i.config.sections import OptimizerConfig
from dist_t2i.distributed.optimizer import AdamWAndMuon, Layout, Piece, build_optimizer
from dist_t2i.errors import CheckpointError, ConfigError, LaunchError
from dist_t2i.utils.allocator import keep_freed_memory

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def init_distributed(device: torch.device) -> None:
    """Join the process group that the environment describes (see launch.py).

    Raises LaunchError when the port at which rank 0 waits for the other ranks is in use.
    """
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Use gloo for CPU ranks, not DeepSpeed's shared-memory collectives, whose compilation at start-up takes 40 s and
    # needs a C++ compiler and ninja.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cpu":
        keep_freed_memory()
    try:
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise LaunchError(
            f"another program (another training?) uses port {os.environ['MASTER_PORT']} of {os.uname().nodename}, at "
            "which rank 0 waits for the other ranks: set MASTER_PORT to a free port (deepspeed --master_port, torchrun "
            "--master-port). A Slurm job uses another port at its next attempt."
        ) from None


def native_precision(device: torch.device) -> Precision:
    """`bf16` on hardware with bf16 arithmetic, otherwise `fp32`: emulated bf16 is about 20 times slower than fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def resolve_precision(precision: Literal["auto"] | Precision, device: torch.device) -> Precision:
    """The precision to use, never `auto`. Raises ConfigError for fp16 on a processor without fp16 arithmetic."""
    if precision == "auto":
        return native_precision(device)
    if precision == "fp16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        problem = "engine.precision: this processor has no fp16 arithmetic (AVX512-FP16 or AMX-FP16)."
        raise ConfigError(f"{problem}\nUse engine.precision=fp32, engine.precision=bf16, or a GPU.")
    return precision


@dataclass(frozen=True)
class EngineSpec:
    """The settings of one engine."""

    name: str  # `generator`, `discriminator` or `text`
    stage: int
    micro_batch: int  # rows per micro-batch and rank
    accumulation: int  # micro-batches per step
    precision: str
    learning_rate: float  # at its peak
    scales: dict[str, float]  # direct child of the module -> factor on the child's learning rate (default: 1)
    offload: bool = False  # whether optimizer states live on the CPU (stages 1 to 3)


def deepspeed_config(spec: EngineSpec, gradient_clipping: float, world_size: int, parameters: int) -> dict[str, Any]:
    """The DeepSpeed configuration of one engine; every value that changes results is written out."""
    # DeepSpeed allocates the reduce bucket at its full size (2 GB by default). The bucket need not exceed the number of
    # parameters, rounded up to a multiple of the alignment.
    bucket, gpu = min(-(-parameters // 4096) * 4096, 500_039_680), torch.cuda.is_available()
    zero: dict[str, Any] = {
        "stage": spec.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "reduce_scatter": False,  # one all-reduce, because DeepSpeed's "scatter" is an all-reduce plus two copies
        "contiguous_gradients": spec.stage >= 2 and gpu,  # copies gradients, which avoids fragmented GPU memory
        "overlap_comm": False,
    }
    if spec.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0 if parameters < 100_000_000 else 100_000
    if spec.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
    return {
        "train_batch_size": spec.micro_batch * spec.accumulation * world_size,
        "train_micro_batch_size_per_gpu": spec.micro_batch,
        "gradient_accumulation_steps": spec.accumulation,
        "gradient_clipping": gradient_clipping,  # always written: DeepSpeed clips at 1.0 by default
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": spec.precision == "bf16"},
        "fp16": {"enabled": spec.precision == "fp16", "initial_scale_power": 12, "loss_scale_window": 500},
    }


def effective_stage(stage: int, precision: str) -> int:
    """In half precision, stage 1 replaces stage 0, because DeepSpeed cannot scale losses at stage 0."""
    return 1 if stage == 0 and precision != "fp32" else stage


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Turn off torch.compile. DeepSpeed decorates its own, unused Muon with torch.compile, which takes a second to load
    at every start."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TORCHDYNAMO_DISABLE")
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


class NetworkEngine:
    """A network, its optimizer (AdamW, and Muon if `optimizer` requests it) and its ZeRO engine."""

    def __init__(self, module: nn.Module, spec: EngineSpec, optimizer: OptimizerConfig, device: torch.device) -> None:
        import deepspeed

        spec = replace(spec, stage=effective_stage(spec.stage, spec.precision))
        self.name, self.stage, self.accumulation = spec.name, spec.stage, spec.accumulation
        self.dtype, self.device, self.world_size = DTYPES[spec.precision], device, dist.get_world_size()
        self.gradient_norm = 0.0
        """Norm of the last step's global gradient before clipping; inf if fp16 overflowed and skipped the step."""
        self._base_rate, module = spec.learning_rate, module.to(device)
        base = build_optimizer(module, optimizer, spec.learning_rate, spec.scales)
        moments = {False: ("exp_avg", "exp_avg_sq"), True: ("exp_avg",)}
        self._moments = {p: moments[group["muon"]] for group in base.param_groups for p in group["params"]}
        parameters = sum(p.numel() for p in module.parameters())
        config = deepspeed_config(spec, optimizer.gradient_clipping, self.world_size, parameters)
        with _without_compiler():
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=base, config=config, dist_init_required=False
            )
        self._parameters: dict[str, Any] = dict(self.module.named_parameters())  # Any: DeepSpeed adds attributes
        self._create_optimizer_state()

    @property
    def module(self) -> nn.Module:
        """The network. Call `module`, not the engine."""
        return self._engine.module

    @property
    def loss_scale(self) -> float:
        """Factor that `backward` applies to a loss; 1 except in fp16."""
        return float(self._zero.loss_scale) if self.dtype is torch.float16 else 1.0

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """A context for the other network's loss, in which the parameters of this network get no gradient."""
        self.module.requires_grad_(False)
        try:
            yield
        finally:
            self.module.requires_grad_(True)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a scalar `loss`, a mean over this rank's micro-batch. One call per micro-batch."""
        if self.stage > 0:
            self._zero.clear_backward_seen_flag()  # announces a backward pass: see the rules above
        self._engine.backward(loss)

    def step(self, rate_scale: float) -> None:
        """Call `step` after `backward`. The last call of a step updates the weights, at peak rate * `rate_scale`."""
        for group in self._base_optimizer.param_groups:
            group["lr"] = self._base_rate * rate_scale * group["scale"]
        # Compute the norm of the global gradient, because DeepSpeed computes this norm at stage 0 only for clipping.
        if self._engine.is_gradient_accumulation_boundary() and self.stage == 0:
            gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
            self.gradient_norm = float(torch.nn.utils.get_total_norm(gradients))
        self._engine.step()
        if self.stage > 0:
            self.gradient_norm = float(self._engine.get_global_grad_norm() or 0.0)

    @property
    def skipped_steps(self) -> int:
        """Number of steps that fp16 skipped because a gradient overflowed."""
        return int(self._engine.skipped_steps)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[Mapping[str, Tensor]]:
        """The full parameters by name, on every rank, in the training dtype. Collective at stage 3. Read only."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self._parameters.values()), enabled=self.stage == 3):
            yield self._parameters

    @property
    def _zero(self) -> Any:
        """ZeRO's optimizer, which wraps `_base_optimizer`; at stage 0, `_base_optimizer` itself."""
        return self._engine.optimizer

    @property
    def _base_optimizer(self) -> AdamWAndMuon:
        return self._zero if self.stage == 0 else self._zero.optimizer

    def _flat_masters(self) -> list[Tensor]:
        """The fp32 tensors that the optimizer updates: this rank's piece of each group, or at stage 0 the
        parameters."""
        if self.stage == 0:
            return list(self._parameters.values())
        zero = self._zero
        return list(zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups)

    def _create_optimizer_state(self) -> None:
        """Create the moments before the optimizer's first step would, so that checkpoints can be loaded."""
        layouts: dict[Tensor, Layout] = {}
        for master, parameters in zip(self._flat_masters(), self._parameters_of_masters(), strict=True):
            step = torch.zeros((), dtype=torch.float32, device=master.device)
            moments = {key: torch.zeros_like(master) for key in self._moments[parameters[0]]}
            self._base_optimizer.state[master] = {"step": step, **moments}
            # A flat master holds pieces of several parameters. Muon needs their layout.
            if self.stage > 0:
                layouts[master] = Layout(tuple(map(self._piece, parameters)), self.world_size > 1, self.device)
                self._base_optimizer.layout_of = layouts.__getitem__
        if self.stage in (1, 2):
            self._zero._lazy_init_hp_params_optimizer_state()

    def _parameters_of_masters(self) -> list[list[nn.Parameter]]:
        """For each tensor of `_flat_masters`, the parameters whose pieces the tensor holds, in order."""
        if self.stage == 0:
            return [[parameter] for parameter in self._parameters.values()]
        return list(self._zero.fp16_groups if self.stage == 3 else self._zero.bit16_groups)

    def _piece(self, parameter: Any) -> Piece:
        """The part of a parameter that this rank's flat master holds, at stages 1 to 3."""
        # Stage 3 splits every parameter into equal pieces, one for each rank; the last pieces end in padding.
        if self.stage == 3:
            _, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            first = size * dist.get_rank()
            return Piece(parameter.ds_shape, first, offset, min(size, max(0, parameter.ds_numel - first)))
        # Stages 1 and 2 split the concatenation of a group's parameters, so a rank may hold only a part of a parameter,
        # or nothing.
        mapping = parameter._hp_mapping
        if mapping is None:
            return Piece(parameter.shape, 0, 0, 0)
        there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Piece(parameter.shape, there.start, here.start, here.numel)

    @torch.no_grad()
    def _full(self, parameter: Any, key: str | None) -> Tensor:
        """The full fp32 master of one parameter, or its moment `key`, on every rank. Collective."""
        from deepspeed import utils as ds

        if self.stage == 0:
            return parameter.detach() if key is None else self._base_optimizer.state[parameter][key]
        wanted = (parameter,) if key is None else (parameter, key)
        if self.stage < 3:
            return (ds.safe_get_full_fp32_param if key is None else ds.safe_get_full_optimizer_state)(*wanted)
        # Stage 3: gather the equal pieces, and drop the padding.
        local = (ds.safe_get_local_fp32_param if key is None else ds.safe_get_local_optimizer_state)(*wanted)
        parts = local.new_empty(local.numel() * self.world_size)
        dist.all_gather_into_tensor(parts, local.detach().clone())
        return parts[: parameter.ds_numel].view(parameter.ds_shape)

    @torch.no_grad()
    def _set_full(self, parameter: Any, value: Tensor, key: str | None) -> None:
        """Set the tensor that `_full` returns, and its copy in the training dtype."""
        from deepspeed import utils as ds

        value = value.to(self.device, torch.float32)
        if self.stage == 0:
            (parameter.data if key is None else self._base_optimizer.state[parameter][key]).copy_(value)
        elif self.stage < 3:
            if key is None:
                ds.safe_set_full_fp32_param(parameter, value)
                parameter.data.copy_(value)
            else:
                ds.safe_set_full_optimizer_state(parameter, value, key)
        else:
            # Stage 3: set this rank's piece, with padding, because DeepSpeed's setter of full tensors does not pad.
            size = parameter.ds_tensor.numel()
            padded = nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
            local = padded[size * dist.get_rank() :][:size]
            if key is None:
                ds.safe_set_local_fp32_param(parameter, local)
                parameter.ds_tensor.data.copy_(local)
            else:
                ds.safe_set_local_optimizer_state(parameter, local, key)

    def weights(self) -> dict[str, Tensor]:
        """fp32 CPU copies of all parameters by name, on every rank. Collective."""
        return {name: self._full(p, None).to("cpu", copy=True) for name, p in self._parameters.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """fp32 CPU copies of the moments: `NAME.exp_avg`, and for AdamW `NAME.exp_avg_sq`. Collective."""
        moments = [(f"{name}.{key}", p, key) for name, p in self._parameters.items() for key in self._moments[p]]
        return {name: self._full(p, key).to("cpu", copy=True) for name, p, key in moments}

    def counters(self) -> dict[str, float]:
        """The engine's scalars: the optimizer's step count, and the loss scale of fp16 with its history."""
        steps = next(iter(self._base_optimizer.state.values()))["step"] if self._base_optimizer.state else 0
        scaler = vars(self._zero.loss_scaler) if self.dtype is torch.float16 else {}
        history = {f"scaler.{name}": value for name, value in scaler.items() if isinstance(value, (int, float))}
        return {"step": float(steps), "skipped_steps": self.skipped_steps, **history}

    def load_state(self, weights: dict[str, Tensor], moments: dict[str, Tensor], counters: dict[str, float]) -> None:
        """Restore what `weights`, `optimizer_state` and `counters` returned at any world size, stage or precision.

        Collective. Raises CheckpointError when the tensors belong to other networks or to another optimizer.
        """
        self._check_fit(weights | moments)
        for name, parameter in self._parameters.items():
            self._set_full(parameter, weights[name], None)
            for key in self._moments[parameter]:
                self._set_full(parameter, moments[f"{name}.{key}"], key)
        for state in self._base_optimizer.state.values():
            state["step"].fill_(counters["step"])
        self._engine.skipped_steps = int(counters["skipped_steps"])
        for name, value in counters.items():
            if name.startswith("scaler.") and self.dtype is torch.float16:
                setattr(self._zero.loss_scaler, name.removeprefix("scaler."), value)

    def _check_fit(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            shape = tuple(parameter.ds_shape if self.stage == 3 else parameter.shape)
            for key in (name, *(f"{name}.{moment}" for moment in self._moments[parameter])):
                actual = tuple(tensors[key].shape) if key in tensors else "not in the checkpoint"
                if actual != shape:
                    raise CheckpointError(
                        f"the checkpoint does not fit the configuration: {key} of the {self.name}'s engine is {actual}"
                        f", but must be {shape}.\nA run keeps its networks and optimizers: restore the old values "
                        "of model.*, text.*, edit.* and optimizer.generator_matrices, or start another run "
                        "(run.folder=...)."
                    )

    def non_finite_groups(self) -> list[str]:
        """Names of the module's direct children whose parameters contain a NaN or Inf. Collective."""
        finite = {name: bool(torch.isfinite(self._full(p, None)).all()) for name, p in self._parameters.items()}
        return list(dict.fromkeys(name.split(".", 1)[0] for name, is_finite in finite.items() if not is_finite))
