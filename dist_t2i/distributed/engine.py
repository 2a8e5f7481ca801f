"""One network under DeepSpeed ZeRO: the only file that knows DeepSpeed.

A GAN needs two engines, and two engines in one process are easy to get silently wrong. The rules kept here:

* the network is called as `engine.module(...)`, never as `engine(...)`: the latter fails in part of the stage pairs. What
  `engine(...)` does beside the call, telling ZeRO that a new backward is to come, `backward` does here: without it the
  gradients of an LSTM's second micro-batch are silently wrong at stage 2 (DeepSpeed 0.19.8);
* whatever takes part in the other network's loss is frozen meanwhile (`frozen()`), or its ZeRO hooks would count the
  gradient as its own;
* one `backward` per micro-batch: a second one is silently wrong at stages 1 to 3, so losses are summed first;
* `gradient_clipping` is always written, because DeepSpeed's default clips at 1.0.

State goes out and in as whole fp32 tensors by parameter name (`state()`, `load_state()`): the same whatever the world
size, the ZeRO stage or the precision, so that a run can resume under any of them, and no pickle is involved.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_t2i.config.sections import Config
from dist_t2i.distributed.optimizer import Layout, Piece, build_optimizer
from dist_t2i.errors import CheckpointError, ConfigError, LaunchError
from dist_t2i.utils.allocator import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def init_distributed(device: torch.device) -> None:
    """Join the process group (rank, world size and address come from the environment; see launch.py).

    Raises LaunchError where the port at which rank 0 waits for the others is taken.
    """
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # Shared-memory collectives for CPU ranks: DeepSpeed would compile them at start-up (a C++ compiler, ninja and 40 s)
    # and gloo does the same work. `tests/distributed/test_engine.py` holds that this switch still works.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cpu":
        keep_freed_memory()
    try:
        deepspeed.init_distributed("nccl" if device.type == "cuda" else "gloo", verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise LaunchError(
            f"port {os.environ['MASTER_PORT']} of this machine, {os.uname().nodename}, at which rank 0 awaits the others, is "
            "taken by another program (another training?): set MASTER_PORT to a free one (deepspeed --master_port, torchrun "
            "--master-port); a Slurm job takes another at its next attempt"
        ) from None


def native_precision(device: torch.device) -> str:
    """`bf16` where the device multiplies it in hardware, else `fp32` (emulated bf16 is some 20 times slower)."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "fp32"


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` as a concrete precision. Raises ConfigError for fp16 on a processor that lacks it."""
    if precision == "auto":
        return native_precision(device)
    if precision == "fp16" and device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
        raise ConfigError(
            "engine.precision: this processor has no fp16 arithmetic (AVX512-FP16 or AMX-FP16).\n"
            "Use engine.precision=fp32, or bf16, or a GPU."
        )
    return precision


@dataclass(frozen=True)
class EngineSpec:
    """What one engine needs to know of the run."""

    name: str
    stage: int
    micro_batch: int
    accumulation: int
    precision: str
    learning_rate: float
    scales: dict[str, float]
    """Learning-rate scale by the name of a direct child of the module; others get 1."""


def deepspeed_config(spec: EngineSpec, config: Config, world_size: int, parameters: int) -> dict:
    """The DeepSpeed configuration of one engine; every value that changes results is written out."""
    # DeepSpeed allocates the reduce bucket whole (2 GB by default); it asks for a multiple of an alignment.
    bucket = min(-(-parameters // 4096) * 4096, 500_039_680)
    zero: dict = {
        "stage": spec.stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # One all-reduce of the bucket as it is: DeepSpeed's "scatter" is an all-reduce, too, with two more copies.
        "reduce_scatter": False,
        # A copy more, which only a GPU's allocator is thankful for.
        "contiguous_gradients": spec.stage >= 2 and torch.cuda.is_available(),
        "overlap_comm": False,
    }
    if spec.stage == 3:
        zero["stage3_param_persistence_threshold"] = 0 if parameters < 100_000_000 else 100_000
    if config.engine.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": spec.micro_batch * spec.accumulation * world_size,
        "train_micro_batch_size_per_gpu": spec.micro_batch,
        "gradient_accumulation_steps": spec.accumulation,
        "gradient_clipping": config.optimizer.gradient_clipping,
        "steps_per_print": None,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": spec.precision == "bf16"},
        "fp16": {"enabled": spec.precision == "fp16", "initial_scale_power": 12, "loss_scale_window": 500},
    }


def effective_stage(stage: int, precision: str) -> int:
    """Half precision needs fp32 masters, which DeepSpeed's stage 0 keeps without loss scaling: it runs as stage 1."""
    return 1 if stage == 0 and precision != "fp32" else stage


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """torch.compile gives functions back as they are. At stages 1 to 3 DeepSpeed loads an optimizer that is not used here,
    Muon, whose functions are decorated with it: loading the compiler for them takes a second of every rank's start."""
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TORCHDYNAMO_DISABLE")
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


class NetworkEngine:
    """A network, its optimizer (AdamW, and Muon where the configuration says so) and its ZeRO engine.

    Raises ConfigError where DeepSpeed cannot run what the configuration asks for.
    """

    def __init__(self, module: nn.Module, spec: EngineSpec, config: Config, device: torch.device):
        import deepspeed

        self.name = spec.name
        self.stage = effective_stage(spec.stage, spec.precision)
        self.dtype = DTYPES[spec.precision]
        self.device = device
        self.accumulation = spec.accumulation
        self._base_rate = spec.learning_rate
        self.world_size = dist.get_world_size()
        spec = EngineSpec(**{**vars(spec), "stage": self.stage})
        module = module.to(device)
        optimizer = build_optimizer(module, config.optimizer, spec.learning_rate, spec.scales)
        self._moments = {
            p: ("exp_avg",) if group["muon"] else ("exp_avg", "exp_avg_sq")
            for group in optimizer.param_groups
            for p in group["params"]
        }
        parameters = sum(p.numel() for p in module.parameters())
        with _without_compiler():
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=deepspeed_config(spec, config, self.world_size, parameters),
                dist_init_required=False,
            )
        self._parameters = dict(self.module.named_parameters())
        self._gradient_norm = 0.0
        self._create_optimizer_state()

    # ---- training ----------------------------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    @property
    def loss_scale(self) -> float:
        """Factor that `backward` puts on a loss (1 but for fp16)."""
        return float(self._zero.loss_scale) if self.dtype is torch.float16 else 1.0

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """No parameter takes a gradient inside: the network is only a function that the other one's loss passes."""
        for parameter in self._parameters.values():
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self._parameters.values():
                parameter.requires_grad_(True)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a scalar `loss` (the mean over this rank's micro-batch); call it once a micro-batch."""
        if self.stage > 0:
            self._zero.clear_backward_seen_flag()  # `engine(...)` would have done it; see the rules above
        self._engine.backward(loss)

    def step(self, rate_scale: float) -> None:
        """After a micro-batch's `backward`; updates the weights when the last of the step has been seen."""
        for group in self._base_optimizer.param_groups:
            group["lr"] = self._base_rate * rate_scale * group["scale"]
        if self._engine.is_gradient_accumulation_boundary() and self.stage == 0:
            gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
            self._gradient_norm = float(torch.nn.utils.get_total_norm(gradients))
        self._engine.step()
        if self.stage > 0:
            self._gradient_norm = float(self._engine.get_global_grad_norm() or 0.0)

    @property
    def gradient_norm(self) -> float:
        """Norm of the last step's global gradient, before clipping (inf where fp16 overflowed and skipped the step)."""
        return self._gradient_norm

    @property
    def skipped_steps(self) -> int:
        """Steps that fp16 skipped because a gradient overflowed."""
        return int(self._engine.skipped_steps)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[dict[str, Tensor]]:
        """The whole parameters by name, on every rank, in the training dtype. Collective at stage 3; read only."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self._parameters.values()), enabled=self.stage == 3):
            yield self._parameters

    # ---- state as whole fp32 tensors ---------------------------------------------------------------------------------

    @property
    def _zero(self):
        return self._engine.optimizer

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        return self._zero if self.stage == 0 else self._zero.optimizer

    def _flat_masters(self) -> list[Tensor]:
        if self.stage == 0:
            return list(self._parameters.values())
        if self.stage == 3:
            return list(self._zero.fp32_partitioned_groups_flat)
        masters = getattr(self._zero, "single_partition_of_fp32_groups", None)
        return list(self._zero.fp32_groups_flat_partition if masters is None else masters)

    def _create_optimizer_state(self) -> None:
        """The optimizer makes its moments in its first step; made here they can be loaded, and all runs begin alike."""
        layouts = {}
        for master, parameters in zip(self._flat_masters(), self._parameters_of_masters(), strict=True):
            self._base_optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                **{
                    key: torch.zeros_like(master, memory_format=torch.preserve_format)
                    for key in self._moments[parameters[0]]
                },
            }
            if self.stage > 0:  # at stage 0 they are whole parameters, which the optimizer takes them for
                layouts[master] = Layout(tuple(map(self._piece, parameters)), self.world_size > 1, self.device)
                self._base_optimizer.layout_of = layouts.__getitem__
        if self.stage in (1, 2):
            self._zero._lazy_init_hp_params_optimizer_state()

    def _parameters_of_masters(self) -> list[list[nn.Parameter]]:
        """Of which parameters each of `_flat_masters` holds this rank's pieces."""
        if self.stage == 0:
            return [[parameter] for parameter in self._parameters.values()]
        return list(self._zero.fp16_groups if self.stage == 3 else self._zero.bit16_groups)

    def _piece(self, parameter: nn.Parameter) -> Piece:
        """Which part of a parameter this rank's flat master holds, and where. ZeRO's stages 1 to 3."""
        if self.stage == 3:
            _, offset, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
            first = size * dist.get_rank()  # every rank holds as many, the last ones' end is padding
            return Piece(parameter.ds_shape, first, offset, min(size, max(0, parameter.ds_numel - first)))
        mapping = parameter._hp_mapping
        if mapping is None:
            return Piece(parameter.shape, 0, 0, 0)
        there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Piece(parameter.shape, there.start, here.start, here.numel)

    @torch.no_grad()
    def _whole(self, parameter: nn.Parameter, key: str | None) -> Tensor:
        """The fp32 master (or a moment, by `key`) of one parameter, whole, on every rank. Collective."""
        from deepspeed.utils import (
            safe_get_full_fp32_param,
            safe_get_full_optimizer_state,
            safe_get_local_fp32_param,
            safe_get_local_optimizer_state,
        )

        if self.stage == 0:
            return parameter.detach() if key is None else self._base_optimizer.state[parameter][key]
        if self.stage < 3:
            return safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)
        local = safe_get_local_fp32_param(parameter) if key is None else safe_get_local_optimizer_state(parameter, key)
        parts = local.new_empty(local.numel() * self.world_size)
        dist.all_gather_into_tensor(parts, local.detach().clone())
        return parts[: parameter.ds_numel].view(parameter.ds_shape)

    @torch.no_grad()
    def _set_whole(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        value = value.to(self.device, torch.float32)
        if self.stage == 0:
            (parameter.data if key is None else self._base_optimizer.state[parameter][key]).copy_(value)
        elif self.stage < 3:
            if key is None:
                safe_set_full_fp32_param(parameter, value)
                parameter.data.copy_(value)
            else:
                safe_set_full_optimizer_state(parameter, value, key)
        else:
            # DeepSpeed's own whole-tensor setter does not pad, and so fails where the world size divides no tensor.
            size = parameter.ds_tensor.numel()
            padded = nn.functional.pad(value.flatten(), (0, size * self.world_size - value.numel()))
            local = padded[size * dist.get_rank() :][:size]
            if key is None:
                safe_set_local_fp32_param(parameter, local)
                parameter.ds_tensor.data.copy_(local)
            else:
                safe_set_local_optimizer_state(parameter, local, key)

    def weights(self) -> dict[str, Tensor]:
        """fp32 CPU copies of all parameters by name. Collective: every rank calls it, every rank gets them."""
        return {name: self._whole(p, None).to("cpu", copy=True) for name, p in self._parameters.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        """fp32 CPU copies of the moments, `NAME.exp_avg` and (AdamW's) `NAME.exp_avg_sq`. Collective."""
        return {
            f"{name}.{key}": self._whole(p, key).to("cpu", copy=True)
            for name, p in self._parameters.items()
            for key in self._moments[p]
        }

    def counters(self) -> dict[str, float]:
        """The engine's scalars: the optimizer's step count, and fp16's loss scale with its history."""
        steps = next(iter(self._base_optimizer.state.values()))["step"] if self._base_optimizer.state else 0
        counters = {"step": float(steps), "skipped_steps": self.skipped_steps}
        if self.dtype is torch.float16:
            scaler = vars(self._zero.loss_scaler)
            counters |= {f"scaler.{k}": v for k, v in scaler.items() if isinstance(v, (int, float))}
        return counters

    def load_state(self, weights: dict[str, Tensor], moments: dict[str, Tensor], counters: dict[str, float]) -> None:
        """Put back what `weights`, `optimizer_state` and `counters` gave, at any world size, stage or precision.

        Raises CheckpointError where they are of other networks, or of another optimizer.
        """
        self._check_fit(weights | moments)
        for name, parameter in self._parameters.items():
            self._set_whole(parameter, weights[name], None)
            for key in self._moments[parameter]:
                self._set_whole(parameter, moments[f"{name}.{key}"], key)
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
                found = tuple(tensors[key].shape) if key in tensors else "not in the checkpoint"
                if found != shape:
                    raise CheckpointError(
                        f"the checkpoint does not fit the configuration: {key} of the {self.name}'s engine is "
                        f"{found}, where it has to be {shape}.\nNetworks and optimizers stay as a run began with them: "
                        "put the old values of model.*, text.*, edit.* and optimizer.generator_matrices back, or start another run "
                        "(run.folder=...)."
                    )

    def non_finite_groups(self) -> list[str]:
        """Names of the parameter groups (direct children of the module) that hold a NaN or Inf. Collective."""
        bad = {}
        for name, parameter in self._parameters.items():
            if not bool(torch.isfinite(self._whole(parameter, None)).all()):
                bad[name.split(".", 1)[0]] = True
        return list(bad)
