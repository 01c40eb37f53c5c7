"""The whole JSON of DeepSpeed 0.19.8 as data: every section and key, its type, what it may hold, its default and its
meaning.

Source: deepspeed/runtime/config.py and the section classes it builds. tests/deepspeed_json/test_schema_contract.py compares
    this file with
the installed DeepSpeed and names every key that was added, removed or given another default.

A section is `typed` when DeepSpeed reads it with a pydantic model: such sections convert leniently ("stage": "2", 5e8
for a whole number). In the others DeepSpeed takes the value as it stands, so a text where a number belongs fails or
lies much later, and is refused here.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["flag", "int", "float", "text", "path", "texts", "words", "betas", "numbers", "mapping"]

_KINDS = {
    "flag": "true or false",
    "int": "a whole number",
    "float": "a number",
    "text": "a text",
    "path": "a path",
    "texts": "a list of texts",
    "words": "a text or a list of texts",
    "betas": "a list of two numbers, each >= 0 and < 1",
    "numbers": "a number or a list of numbers",
    "mapping": "a mapping of keys",
}


@dataclass(frozen=True)
class Key:
    """One value: its type, default and range."""

    kind: Kind
    default: Any = None
    help: str = ""
    null: bool = False
    """Whether null may stand for 'not set'."""
    choices: tuple[Any, ...] = ()
    fold_case: bool = False
    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None
    alias: str = ""
    """Another spelling that DeepSpeed reads."""
    instead: str = ""
    """Set for a deprecated key that DeepSpeed still honours: what to write instead."""
    auto: bool = False
    """Whether ChatGoT resolves the value "auto"."""
    required: bool = False
    no_flag: bool = False
    """Whether true and false are refused for a number even where pydantic would convert them."""

    def allowed(self) -> str:
        """What may stand here, in words."""
        if self.choices:
            words = "one of " + ", ".join(map(str, self.choices))
        else:
            limits = ((">=", self.low), ("<=", self.high), (">", self.above), ("<", self.below))
            words = " and ".join(
                [_KINDS[self.kind], *(f"{sign} {bound:g}" for sign, bound in limits if bound is not None)]
            )
        return words + (" or null" if self.null else "") + (' or "auto"' if self.auto else "")

    def read(self, value: Any, typed: bool) -> Any:
        """`value` as DeepSpeed will understand it.

        Args:
            value: as parsed from the file.
            typed: whether a pydantic model reads it (lenient conversions).

        Raises:
            ValueError: the value is of another type, out of range, or none of the choices.
        """
        if value is None:
            if self.null:
                return None
            raise ValueError
        if self.no_flag and isinstance(value, bool):
            raise ValueError
        value = _READERS[self.kind](value, typed)
        if self.choices:
            folded = {str(c).lower() if self.fold_case else c: c for c in self.choices}
            word = str(value).lower() if self.fold_case else value
            if word not in folded:
                raise ValueError
            return folded[word]
        for number in value if self.kind == "numbers" and isinstance(value, list) else [value]:
            inside = (
                (self.low is None or number >= self.low)
                and (self.high is None or number <= self.high)
                and (self.above is None or number > self.above)
                and (self.below is None or number < self.below)
            )
            if not inside:
                raise ValueError
        return value


@dataclass(frozen=True)
class Section:
    """A mapping of keys."""

    keys: dict[str, Key | Section] = field(default_factory=dict)
    help: str = ""
    model: str = ""
    """module:Class of the pydantic model that reads it; empty: plain getters."""
    null: bool = False
    open: bool = False
    """Whether other keys may stand here as well (they are somebody else's arguments)."""
    alias: str = ""
    bare: tuple[Any, ...] = ()
    """Values that may stand in place of the mapping."""

    @property
    def typed(self) -> bool:
        """Whether DeepSpeed reads the section with a pydantic model."""
        return bool(self.model)


def _read_flag(value: Any, typed: bool) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and value in (0, 1):
        return bool(value)
    if typed and isinstance(value, str):
        word = value.lower()
        if word in ("1", "true", "t", "yes", "y", "on"):
            return True
        if word in ("0", "false", "f", "no", "n", "off"):
            return False
    raise ValueError


def _read_int(value: Any, typed: bool) -> int:
    if isinstance(value, bool) and not typed:
        raise ValueError
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if typed and isinstance(value, str):
        number = float(value)
        if "e" not in value.lower() and number.is_integer():
            return int(value) if value.strip().lstrip("+-").isdigit() else int(number)
    raise ValueError


def _read_float(value: Any, typed: bool) -> float:
    if isinstance(value, bool) and not typed:
        raise ValueError
    if isinstance(value, (int, float)) or (typed and isinstance(value, str)):
        number = float(value)
        if math.isfinite(number):
            return number
    raise ValueError


def _read_text(value: Any, typed: bool) -> str:
    if isinstance(value, str):
        return value
    raise ValueError


def _read_path(value: Any, typed: bool) -> str:
    if isinstance(value, str) and (value or typed):
        return value
    raise ValueError


def _read_words(value: Any, typed: bool) -> list[str]:
    return [value] if isinstance(value, str) else _read_texts(value, typed)


def _read_texts(value: Any, typed: bool) -> list[str]:
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return value
    raise ValueError


def _read_betas(value: Any, typed: bool) -> list[float]:
    if isinstance(value, (list, tuple)) and len(value) == 2:
        betas = [_read_float(item, False) for item in value]
        if all(0.0 <= beta < 1.0 for beta in betas):
            return betas
    raise ValueError


def _read_numbers(value: Any, typed: bool) -> Any:
    if isinstance(value, (list, tuple)) and value:
        return [_read_float(item, False) for item in value]
    return _read_float(value, False)


def _read_mapping(value: Any, typed: bool) -> dict:
    if isinstance(value, dict):
        return value
    raise ValueError


_READERS = {
    "flag": _read_flag,
    "int": _read_int,
    "float": _read_float,
    "text": _read_text,
    "path": _read_path,
    "texts": _read_texts,
    "words": _read_words,
    "betas": _read_betas,
    "numbers": _read_numbers,
    "mapping": _read_mapping,
}


def _flag(default: bool | None, help: str = "", **more: Any) -> Key:
    return Key("flag", default, help, **more)


def _int(default: int | None, help: str = "", **more: Any) -> Key:
    return Key("int", default, help, **more)


def _float(default: float | None, help: str = "", **more: Any) -> Key:
    return Key("float", default, help, **more)


def _text(default: str | None, help: str = "", **more: Any) -> Key:
    return Key("text", default, help, **more)


# deepspeed/runtime/config.py, DtypeEnum: every spelling of each type.
FP16_NAMES = ("fp16", "float16", "half", "torch.float16")
BF16_NAMES = ("bf16", "bfloat16", "torch.bfloat16")
FP32_NAMES = ("fp32", "float32", "float", "torch.float32")
DTYPE_NAMES = FP32_NAMES + BF16_NAMES + FP16_NAMES
REDUCE_DTYPE_NAMES = ("fp32", "fp16", "bf16")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")


OFFLOAD_PARAM = Section(
    model="deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffloadParamConfig",
    help="Keep the parameters of ZeRO stage 3 in CPU memory or on NVMe.",
    null=True,
    keys={
        "device": _text(
            "none", "Where the parameters wait while they are not computed with.", choices=("none", "cpu", "nvme")
        ),
        "nvme_path": Key("path", None, "Folder on the NVMe drive.", null=True),
        "buffer_count": _int(5, "Buffers in the NVMe pool.", low=0),
        "buffer_size": _int(100_000_000, "Elements per NVMe buffer.", low=0),
        "max_in_cpu": _int(1_000_000_000, "Elements kept in CPU memory when offloading to NVMe.", low=0),
        "pin_memory": _flag(
            True, "Page-locked CPU memory: faster copies, cannot be swapped out. Was false before 2026."
        ),
    },
)

OFFLOAD_OPTIMIZER = Section(
    model="deepspeed.runtime.zero.offload_config:DeepSpeedZeroOffloadOptimizerConfig",
    help="Keep the optimizer state in CPU memory or on NVMe, and step there (ZeRO 1-3).",
    null=True,
    keys={
        "device": _text("none", "Where the optimizer state lives.", choices=("none", "cpu", "nvme")),
        "nvme_path": Key("path", None, "Folder on the NVMe drive.", null=True),
        "buffer_count": _int(4, "Buffers in the NVMe pool; at least the states per parameter.", low=0),
        "pin_memory": _flag(
            True, "Page-locked CPU memory: faster copies, cannot be swapped out. Was false before 2026."
        ),
        "pipeline_read": _flag(False, "Read the next tile from NVMe while this one is computed."),
        "pipeline_write": _flag(False, "Write the previous tile to NVMe while this one is computed."),
        "fast_init": _flag(False, "Fast optimizer initialisation on NVMe."),
        "ratio": _float(
            1.0, "Share of the optimizer state that is offloaded (stage 3 only below 1).", low=0.0, high=1.0
        ),
        "super_offload": _flag(False, "Speculative CPU optimizer for superchips (stage 3 only)."),
        "cpuadam_cores_perc": _float(0.8, "Share of the CPU cores that super_offload uses.", low=0.0, high=1.0),
    },
)

ZENFLOW = Section(
    model="deepspeed.runtime.zenflow.zenflow_config:ZenFlowConfig",
    help="Stall-free optimizer offload.",
    null=True,
    keys={
        "topk_ratio": _float(
            0.1,
            "Share of gradient columns that count as important and are stepped on the device.",
            above=0.0,
            below=1.0,
        ),
        "select_strategy": _text(
            "auto",
            "When the important columns are chosen anew: by step, by epoch, or found out.",
            choices=("auto", "step", "epoch"),
        ),
        "select_interval": _text("auto", "Steps or epochs between choices; auto: found out."),
        "update_interval": _text(
            "auto", "Steps over which unimportant gradients are gathered before they are applied; auto: found out."
        ),
        "overlap_step": _flag(False, "Run the CPU's optimizer step beside the next forward and backward pass."),
        "offload": _flag(False, "Keep the state of the important columns in CPU memory too."),
        "auto_ratio": _float(
            0.99, "Threshold from which the automatic strategy derives update_interval.", low=0.0, high=1.0
        ),
        "full_warm_up_rounds": _int(0, "First rounds in which every gradient is applied at once."),
        "pt_reserved_cores_perc": _float(0.5, "Share of the CPU cores that stays with PyTorch.", low=0.0, high=1.0),
        "steps_per_epoch": _int(None, "DeepSpeed fills it in itself; not for users.", null=True),
    },
)

LEAF_MODULE = Section(
    model="deepspeed.runtime.zero.leaf_module_config:DeepSpeedZeroLeafModuleConfig",
    help="Modules that ZeRO stage 3 fetches as one unit.",
    null=True,
    keys={
        "classes": Key("words", None, "Class names, with their package."),
        "names": Key("words", [], "Module names."),
        "name_suffixes": Key("words", [], "Ends of module names."),
    },
)

ZERO_OPTIMIZATION = Section(
    model="deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
    help="ZeRO: optimizer state (1), gradients (2) and parameters (3) shared out over the ranks.",
    bare=(True, False),
    keys={
        "stage": _int(0, "0: off; 1: optimizer state; 2: and gradients; 3: and parameters.", choices=(0, 1, 2, 3)),
        "contiguous_gradients": _flag(True, "Copy gradients into one buffer as they appear, against fragmentation."),
        "reduce_scatter": _flag(True, "Average gradients by reduce-scatter instead of all-reduce."),
        "reduce_bucket_size": _int(
            500_000_000, "Elements reduced at a time; a buffer of this size is allocated.", above=0, auto=True
        ),
        "use_multi_rank_bucket_allreduce": _flag(True, "One all-reduce for the buckets of several ranks."),
        "allgather_partitions": _flag(True, "Gather updated parameters by all-gather instead of broadcasts."),
        "allgather_bucket_size": _int(500_000_000, "Elements gathered at a time; even.", low=0, auto=True),
        "overlap_comm": _flag(None, "Reduce gradients during backward; null: only at stage 3.", null=True),
        "compute_grad_norm": _flag(True, "Compute the global gradient norm (stages 1 and 2)."),
        "load_from_fp32_weights": _flag(
            True, "Master weights from the checkpoint's fp32 copies rather than the 16-bit ones."
        ),
        "elastic_checkpoint": _flag(False, "Legacy; not at stage 3."),
        "offload_param": OFFLOAD_PARAM,
        "offload_optimizer": OFFLOAD_OPTIMIZER,
        "zenflow": ZENFLOW,
        "sub_group_size": _int(1_000_000_000, "Elements per tile of the stage-3 optimizer step.", low=0),
        "cpu_offload_param": _flag(
            None,
            "Old switch for keeping parameters in CPU memory (stage 3).",
            null=True,
            instead='"offload_param": {"device": "cpu"}',
        ),
        "cpu_offload_use_pin_memory": _flag(
            None,
            "Old switch for page-locked memory; DeepSpeed ignores it.",
            null=True,
            instead='"pin_memory" inside offload_param or offload_optimizer',
        ),
        "cpu_offload": _flag(
            None,
            "Old switch for keeping the optimizer state in CPU memory.",
            null=True,
            instead='"offload_optimizer": {"device": "cpu"}',
        ),
        "stage3_prefetch_bucket_size": _int(
            50_000_000, "Elements fetched ahead of use (stage 3).", low=0, alias="prefetch_bucket_size", auto=True
        ),
        "stage3_param_persistence_threshold": _int(
            100_000,
            "Parameters smaller than this stay whole on every rank (stage 3).",
            low=0,
            alias="param_persistence_threshold",
            auto=True,
        ),
        "stage3_model_persistence_threshold": _int(
            sys.maxsize, "Most elements that may stay whole (stage 3).", low=0, alias="model_persistence_threshold"
        ),
        "stage3_max_live_parameters": _int(
            1_000_000_000, "Most elements gathered at a time.", low=0, alias="max_live_parameters"
        ),
        "stage3_max_reuse_distance": _int(
            1_000_000_000,
            "Keep a parameter that is used again within so many elements.",
            low=0,
            alias="max_reuse_distance",
        ),
        "stage3_gather_16bit_weights_on_model_save": _flag(
            False, "Gather the weights for save_16bit_model().", alias="gather_16bit_weights_on_model_save"
        ),
        "stage3_module_granularity_threshold": _int(
            0, "Fetch finer modules than this as one.", alias="module_granularity_threshold"
        ),
        "stage3_use_all_reduce_for_fetch_params": _flag(
            False, "Fetch by all-reduce.", alias="use_all_reduce_for_fetch_params"
        ),
        "stage3_allgather_sequential": _flag(False, "Gather parameters one by one.", alias="allgather_sequential"),
        "stage3_gather_fp16_weights_on_model_save": _flag(
            False,
            "Old name of stage3_gather_16bit_weights_on_model_save.",
            instead='"stage3_gather_16bit_weights_on_model_save"',
        ),
        "ignore_unused_parameters": _flag(True, "Allow parameters without gradients (stage 2)."),
        "legacy_stage1": _flag(False, "The old stage 1; DeepSpeed no longer has it."),
        "round_robin_gradients": _flag(
            False, "Spread gradient copies over the ranks when offloading (stages 1 and 2)."
        ),
        "parameter_alignment": _flag(False, "Align every parameter in the flat buffers; must match on resume."),
        "zero_hpz_partition_size": _int(1, "Ranks that share a secondary copy of the parameters.", low=0),
        "zero_quantized_weights": _flag(False, "Gather quantized weights (CUDA only)."),
        "zero_quantized_nontrainable_weights": _flag(False, "Keep frozen weights quantized (CUDA only)."),
        "zero_quantized_gradients": _flag(False, "Reduce quantized gradients (CUDA only)."),
        "memory_efficient_linear": _flag(True, "Memory-saving linear layer (stage 3)."),
        "pipeline_loading_checkpoint": _flag(False, "Load checkpoints in pipeline mode (stage 3)."),
        "override_module_apply": _flag(True, "Override Module.apply (stage 3)."),
        "log_trace_cache_warnings": _flag(False, "Log when the fetch order changes (stage 3)."),
        "enable_sanity_checks": _flag(False, "DeepSpeed's internal checks."),
        "save_muon_momentum_buffer_in_memory": _flag(False, "Keep Muon's momentum off NVMe (stage 3)."),
        "leaf_module": LEAF_MODULE,
    },
)

BF16 = Section(
    model="deepspeed.runtime.precision_config:DeepSpeedBF16Config",
    help="Train in bfloat16 with fp32 master weights.",
    alias="bfloat16",
    null=True,
    keys={
        "enabled": _flag(False, "Turn it on.", auto=True),
        "immediate_grad_update": _flag(
            False, "Add gradients to the fp32 copy as they appear (stage 1 with fp32 accumulation)."
        ),
        "check_grad_overflow": _flag(True, "Skip steps with non-finite gradients. Was false before 2026."),
        "bf16_master_weights_and_grads": _flag(False, "No fp32 master weights."),
        "bf16_optimizer_states": _flag(False, "Optimizer state in bf16 too."),
    },
)

FP16 = Section(
    model="deepspeed.runtime.precision_config:DeepSpeedFP16Config",
    help="Train in float16 with fp32 master weights and loss scaling.",
    keys={
        "enabled": _flag(False, "Turn it on.", auto=True),
        "auto_cast": _flag(False, "Cast floating-point inputs to fp16."),
        "loss_scale": _float(0.0, "0: dynamic loss scaling; else this scale.", low=0.0, no_flag=True),
        "initial_scale_power": _int(16, "The first dynamic scale is 2 to this power."),
        "loss_scale_window": _int(1000, "Steps without overflow before the scale doubles.", no_flag=True),
        "hysteresis": _int(2, "Overflows before the scale halves."),
        "consecutive_hysteresis": _flag(False, "Count only overflows in a row."),
        "min_loss_scale": _int(1, "The scale never falls below this.", no_flag=True),
        "fp16_master_weights_and_grads": _flag(False, "No fp32 master weights (CPU offload only)."),
    },
)

TORCH_AUTOCAST = Section(
    help="torch.autocast around the forward pass; the parameters stay fp32.",
    keys={
        "enabled": _flag(False, "Turn it on.", null=True),
        "dtype": _text(None, "16-bit type; must be given when enabled.", choices=BF16_NAMES + FP16_NAMES),
        "lower_precision_safe_modules": Key("texts", None, "Classes whose gradients travel in 16 bits."),
    },
)

DATA_TYPES = Section(
    help="Types that differ from the training precision.",
    keys={
        "grad_accum_dtype": _text(
            None, "Type in which gradients are accumulated; null: the model's.", choices=DTYPE_NAMES, null=True
        ),
        "param_dtype": _text(None, "Must equal the training precision.", choices=DTYPE_NAMES, null=True),
        "buffer_dtype": _text(None, "Cast float buffers; null: leave them.", choices=DTYPE_NAMES, null=True),
        "keep_in_fp32_modules": Key("texts", "auto", 'Names of buffers that stay fp32: a list of patterns or "auto".'),
    },
)

ACTIVATION_CHECKPOINTING = Section(
    help="Recompute activations in backward. In ChatGoT the section's presence turns it on.",
    keys={
        "partition_activations": _flag(False, "Share saved activations over model-parallel ranks.", null=True),
        "number_checkpoints": _int(None, "Saved blocks, for contiguous_memory_optimization.", null=True, low=1),
        "contiguous_memory_optimization": _flag(False, "One buffer for the saved activations.", null=True),
        "synchronize_checkpoint_boundary": _flag(False, "Synchronize the device at every saved block.", null=True),
        "profile": _flag(False, "Log forward and backward time of every block.", null=True),
        "cpu_checkpointing": _flag(False, "Keep saved activations in CPU memory.", null=True),
    },
)

CHECKPOINT = Section(
    help="How DeepSpeed writes checkpoints.",
    keys={
        "tag_validation": _text(
            "Warn", "What to do when ranks name different tags.", choices=("Ignore", "Warn", "Fail"), fold_case=True
        ),
        "load_universal": _flag(False, "Load universal checkpoints.", null=True),
        "use_node_local_storage": _flag(False, "Every node writes to its own disk.", null=True),
        "parallel_write": Section(
            help="Which ranks write at the same time.",
            keys={"pipeline_stage": _flag(False, "Write pipeline stages in parallel.")},
        ),
        "checkpoint_serialization": _flag(True, "torch.save's zip format."),
        "writer": Section(
            help="DeepSpeed's own fast writers of checkpoint files.",
            null=True,
            keys={
                "type": _text(
                    "fast",
                    "Which writer: mock writes nothing, python is plain file I/O, fast is asynchronous I/O.",
                    choices=("mock", "python", "fast"),
                    fold_case=True,
                ),
                "decoupled": _flag(False, "Write in another process while training goes on."),
                "io_buffer_size": _int(64 * 1024**2, "Bytes of the write buffer."),
                "io_buffer_double": _flag(True, "Fill one buffer while the other is written."),
                "show_statistics": _flag(False, "Print the speed of every write."),
                "data_parallel": _text(
                    None,
                    "Share the writing of one file out over ranks: all replicas, one per socket, or one per machine.",
                    choices=("replica", "socket", "machine"),
                    fold_case=True,
                    null=True,
                ),
                "io_multiplier": _int(1, "Writers per machine, a multiple of what data_parallel gives."),
            },
        ),
    },
)

WANDB = Section(
    model="deepspeed.monitor.config:WandbConfig",
    help="Weights & Biases. ChatGoT writes the run itself and takes this section from the configuration that DeepSpeed gets.",
    keys={
        "enabled": _flag(False, "Turn it on."),
        "group": _text(None, "Group of runs.", null=True),
        "team": _text(None, "Team (entity) that owns the project.", null=True),
        "project": _text("deepspeed", "Project."),
    },
)

TENSORBOARD = Section(
    model="deepspeed.monitor.config:TensorBoardConfig",
    help="DeepSpeed's own event files: learning rate and loss scale only.",
    keys={
        "enabled": _flag(False, "Turn it on."),
        "output_path": _text("", "Folder."),
        "job_name": _text("DeepSpeedJobName", "Folder inside output_path."),
    },
)

CSV_MONITOR = Section(
    model="deepspeed.monitor.config:CSVConfig",
    help="DeepSpeed's own CSV files: learning rate and loss scale only.",
    keys={
        "enabled": _flag(False, "Turn it on."),
        "output_path": _text("", "Folder."),
        "job_name": _text("DeepSpeedJobName", "Folder inside output_path."),
    },
)

COMET = Section(
    model="deepspeed.monitor.config:CometConfig",
    help="Comet experiment tracking: learning rate and loss scale only.",
    keys={
        "enabled": _flag(False, "Turn it on."),
        "samples_log_interval": _int(100, "Samples between submissions.", low=1),
        "project": _text(None, "Project on the server.", null=True),
        "workspace": _text(None, "Workspace that owns the project.", null=True),
        "api_key": _text(None, "Key of the account; an environment variable is safer.", null=True),
        "experiment_name": _text(None, "Name of the experiment.", null=True),
        "experiment_key": _text(None, "Identity of an experiment to go on with.", null=True),
        "online": _flag(None, "Send at once; false: keep in files.", null=True),
        "mode": _text(None, "Whether to create an experiment, get one, or either.", null=True),
    },
)

FLOPS_PROFILER = Section(
    help="Count floating-point operations at one step and print a table.",
    keys={
        "enabled": _flag(False, "Turn it on."),
        "recompute_fwd_factor": _float(0.0, "1 when activations are recomputed.", low=0.0),
        "profile_step": _int(1, "Optimizer step that is profiled.", low=0),
        "module_depth": _int(-1, "Depth of the printed tree; -1: all.", low=-1),
        "top_modules": _int(1, "Modules listed per depth.", low=1),
        "detailed": _flag(True, "Print the whole tree."),
        "output_file": Key("path", None, "Print into this file.", null=True),
    },
)

COMMS_LOGGER = Section(
    model="deepspeed.comm.config:CommsLoggerConfig",
    help="Measure collectives.",
    keys={
        "enabled": _flag(False, "Turn it on."),
        "prof_all": _flag(True, "All collectives."),
        "prof_ops": Key("texts", [], "Only these."),
        "verbose": _flag(False, "Print each one."),
        "debug": _flag(False, "Name the caller."),
    },
)

TIMERS = Section(
    help="DeepSpeed's own timers.",
    keys={
        "throughput": Section(
            help="Samples per second, measured by DeepSpeed.",
            model="deepspeed.utils.config:DeepSpeedThroughputTimerConfig",
            keys={
                "enabled": _flag(True, "Measure samples per second."),
                "synchronized": _flag(True, "Synchronize the device for it, twice per step."),
            },
        )
    },
)

AIO = Section(
    help="Asynchronous file access for NVMe offload.",
    null=True,
    keys={
        "block_size": _int(1048576, "Bytes per request.", low=1),
        "queue_depth": _int(8, "Requests in flight.", low=1),
        "intra_op_parallelism": _int(1, "Threads per request.", low=1),
        "single_submit": _flag(False, "Submit requests one by one."),
        "overlap_events": _flag(True, "Submit and wait at the same time."),
        "use_gds": _flag(False, "GPUDirect Storage (CUDA only)."),
    },
)

COMPILE = Section(
    model="deepspeed.compile.config:CompileConfig",
    help="DeepCompile. Takes effect with chatgot.compile.enabled only.",
    keys={
        "deepcompile": _flag(False, "Turn it on (CUDA only)."),
        "autoep_non_moe": _flag(False, "Compile what surrounds expert layers and leave those as they are."),
        "free_activation": _flag(False, "Free large activations as soon as nothing needs them."),
        "free_activation_threshold": _int(
            10 * 1024 * 1024, "Smallest activation, in bytes, that free_activation frees early."
        ),
        "offload_activation": _flag(False, "Move saved activations to CPU memory and back before they are needed."),
        "offload_activation_pin_memory": _flag(True, "Page-locked CPU memory for offload_activation."),
        "offload_opt_states": _flag(
            False, "Move optimizer states to CPU memory during forward and backward; made for one micro batch per step."
        ),
        "double_buffer": _flag(True, "Two buffers, so that copying and computing overlap."),
        "symmetric_memory": _flag(False, "Use torch's symmetric memory for collectives."),
        "debug_log": _flag(False, "Write the compiled graphs to files."),
        "offload_parameters": _flag(False, "Move parameters to CPU memory between their uses."),
        "sync_before_reduce": _flag(False, "Wait for the device before gradients are reduced; for hunting errors."),
        "sync_after_reduce": _flag(False, "Wait for the device after gradients were reduced; for hunting errors."),
        "sync_before_allgather": _flag(
            False, "Wait for the device before parameters are gathered; for hunting errors."
        ),
        "sync_after_allgather": _flag(False, "Wait for the device after parameters were gathered; for hunting errors."),
        "keep_int_input_tensors": _flag(True, "Keep whole-number inputs as they are while graphs are profiled."),
        "keep_all_input_tensors": _flag(False, "Keep all inputs as they are while graphs are profiled."),
        "passes": Key("texts", None, "Optimisation passes.", null=True),
    },
)

HYBRID_ENGINE = Section(
    model="deepspeed.runtime.config:HybridEngineConfig",
    help="One engine for RLHF training and generation.",
    keys={
        "enabled": _flag(False, "Turn it on."),
        "max_out_tokens": _int(512, "Longest generated sequence, prompt included.", above=0),
        "inference_tp_size": _int(1, "Ranks that share a tensor while generating."),
        "release_inference_cache": _flag(False, "Free the key/value cache after every generation."),
        "pin_parameters": _flag(True, "Keep gathered parameters between generations."),
        "tp_gather_partition_size": _int(8, "Partitions gathered at a time for generation."),
        "enable_cuda_graph": _flag(False, "Generate with CUDA graphs."),
    },
)

TENSOR_PARALLEL = Section(
    model="deepspeed.runtime.tensor_parallel.config:TPTrainingConfig",
    help="Automatic tensor parallelism.",
    keys={
        "dtype": _text("fp16", "Type that the sharded model is cast to.", choices=DTYPE_NAMES),
        "autotp_size": _int(0, "Ranks that share each tensor; 0: off.", low=0),
        "tp_overlap_comm": _flag(False, "All-reduce while computing."),
        "vocab_parallel_lm_head": _flag(
            None, "Share the output head out by vocabulary; null: where the model's plan says so.", null=True
        ),
        "vocab_parallel_ce_backend": _text(
            "torch", "Who computes the loss of a shared output head.", choices=("torch", "liger")
        ),
        "tensor_parallel": Section(
            help="Sizes of the groups.",
            model="deepspeed.runtime.tensor_parallel.config:TPConfig",
            alias="tp",
            keys={
                "tp_size": _int(1, "Ranks that share each tensor."),
                "tp_grain_size": _int(1, "Split sizes are multiples of this."),
                "mpu": Key("mapping", null=True, help="A Python object that knows the groups."),
                "tp_group": Key("mapping", null=True, help="A Python process group."),
            },
        ),
        "injection_policy_tuple": Key(
            "texts", null=True, help="Layers whose output is reduced, for models that DeepSpeed does not know."
        ),
        "partition_config": Key("mapping", null=True, help="Rules that say how each layer is split."),
        "preset_model": _text(None, "A model family whose rules DeepSpeed knows.", null=True),
        "keep_module_on_host": _flag(False, "Load checkpoints into CPU memory, not onto the device."),
        "replace_with_kernel_inject": _flag(False, "Put in DeepSpeed's inference kernels.", alias="kernel_inject"),
    },
)

EXPERT_PARALLEL = Section(
    help="Automatic expert parallelism for mixture-of-experts models.",
    null=True,
    keys={
        "enabled": _flag(False, "Turn it on.", null=True),
        "autoep_size": _int(1, "Ranks that share the experts."),
        "expert_tensor_parallel_size": _int(1, "Ranks that share each expert."),
        "validate_folding_routing": _flag(False, "Check that the ranks of a group route alike."),
        "async_split_plan": _flag(False, "Plan the exchange of tokens while computing."),
        "preset_model": _text(None, "A mixture-of-experts family that DeepSpeed knows.", null=True),
        "moe_layer_pattern": _text(None, "Names of the expert layers.", null=True),
        "expert_pattern": _text(None, "Names of the experts in them.", null=True),
        "router_pattern": _text(None, "Name of the router in them.", null=True),
        "use_grouped_mm": _flag(True, "Multiply all experts' matrices in one call."),
        "disable_triton_grouped_mm": _flag(False, "Not with Triton's kernel for that."),
        "route_norm": _flag(None, "Normalise the routing weights; null: as the preset does.", null=True),
        "route_scale": _float(1.0, "Factor on the routing weights."),
        "score_apply": _text("auto", "Weigh tokens before or after the experts."),
        "combine_impl": _text("auto", "How the experts' outputs are summed."),
        "row_weighting_impl": _text("auto", "How rows are weighted."),
        "gate_up_impl": _text("separate", "Gate and up projections apart or in one matrix."),
        "comm_backend": _text("comm", "Who exchanges the tokens: DeepSpeed's collectives or DeepEP."),
        "comm_num_sm": _int(12, "Multiprocessors that DeepEP may use."),
        "comm_qp_margin": _int(4, "Spare queue pairs of DeepEP."),
        "comm_max_tokens_per_rank": _int(0, "Most tokens a rank sends through DeepEP; 0: no limit."),
        "num_expert_groups": _int(None, "Groups that the experts form.", null=True),
        "num_limited_groups": _int(None, "Groups that one token may be routed to.", null=True),
        "score_func": _text("auto", "How the router's scores are normalised."),
        "top_k": _int(None, "Experts per token.", auto=True),
        "load_balance_coeff": _float(None, "Weight of the load-balancing loss.", null=True),
        "routed_scaling_factor": _float(None, "Factor on the routed experts' output.", auto=True),
        "expert_w1": _text(None, "Name of the gate projection.", null=True),
        "expert_w2": _text(None, "Name of the down projection.", null=True),
        "expert_w3": _text(None, "Name of the up projection.", null=True),
        "num_experts_attr": _text(
            None, "Attribute of the model's configuration with the number of experts.", null=True
        ),
        "top_k_attr": _text(None, "The one with the experts per token.", null=True),
        "has_shared_experts": _flag(None, "Whether experts that see every token stand beside the others.", null=True),
        "shared_experts_pattern": _text(None, "Their names.", null=True),
        "shared_experts_gate_pattern": _text(None, "Name of their gate.", null=True),
        "expert_activation": _text(None, "The experts' activation function.", null=True),
    },
)

DATA_EFFICIENCY = Section(
    help="DeepSpeed's curriculum sampling and random layer-token dropping.",
    keys={
        "enabled": _flag(False, "Turn it on.", null=True),
        "seed": _int(1234, "Seed of the sampling."),
        "data_sampling": Section(
            help="Which samples are drawn, and when.",
            keys={
                "enabled": _flag(False, "Turn it on.", null=True),
                "num_epochs": _int(1000, "Passes over the data."),
                "num_workers": _int(0, "Worker processes of the data loader."),
                "pin_memory": _flag(False, "Page-locked memory in the data loader."),
                "curriculum_learning": Section(
                    help="Draw easy samples first.", open=True, keys={"enabled": _flag(False, "Turn it on.", null=True)}
                ),
                "dynamic_batching": Section(
                    help="Batches by number of tokens.",
                    keys={
                        "enabled": _flag(False, "Turn it on.", null=True),
                        "metrics_path": Key("path", help="Folder with the samples' lengths."),
                        "lr_scaling_method": _text("linear", "How the learning rate follows the batch size."),
                        "min_batch_size": _int(1, "Fewest samples in a batch."),
                        "max_batch_size": _int(None, "Most samples in a batch."),
                        "sequence_picking_order": _text("dataloader", "Order in which sequences are picked."),
                        "max_tokens": _int(None, "Most tokens in a batch."),
                        "verbose": _flag(False, "Print the batches."),
                    },
                ),
            },
        ),
        "data_routing": Section(
            help="Which tokens pass through which layers.",
            keys={
                "enabled": _flag(False, "Turn it on.", null=True),
                "random_ltd": Section(
                    help="Drop tokens at random in the middle layers.",
                    open=True,
                    keys={"enabled": _flag(False, "Turn it on.", null=True)},
                ),
            },
        ),
    },
)

PIPELINE = Section(
    help="Pipeline parallelism (PipelineModule only).",
    keys={
        "stages": _int(None, "Number of stages.", auto=True),
        "partition": _text("best", "How layers are shared out over stages."),
        "seed_layers": _flag(False, "Seed every layer on its own."),
        "activation_checkpoint_interval": _int(0, "Layers between saved activations; 0: recompute nothing."),
        "pipe_partitioned": _flag(True, "Share activations between stages out over ranks."),
        "grad_partitioned": _flag(True, "Share gradients between stages out over ranks."),
    },
)

AUTOTUNING = Section(
    help="DeepSpeed's launcher-side search for fast settings (deepspeed --autotuning).",
    keys={
        "enabled": _flag(False, "Turn it on.", null=True),
        "fast": _flag(True, "Tune batch sizes only."),
        "results_dir": Key("path", "autotuning_results", "Folder for the results."),
        "exps_dir": Key("path", "autotuning_exps", "Folder for the experiments."),
        "overwrite": _flag(True, "Replace earlier results."),
        "start_profile_step": _int(3, "First step that counts."),
        "end_profile_step": _int(5, "Last step that counts."),
        "metric": _text("throughput", "What is optimised: throughput, latency or flops."),
        "metric_path": Key("path", null=True, help="File that the program writes its metric to."),
        "tuner_type": _text("gridsearch", "How experiments are chosen."),
        "tuner_early_stopping": _int(5, "Experiments without gain that end the search."),
        "tuner_num_trials": _int(50, "Most experiments."),
        "arg_mappings": Key(
            "mapping", null=True, help="Keys of the JSON and the program's arguments that follow them."
        ),
        "model_info": Section(
            help="What is known of the model.",
            null=True,
            keys={
                "profile": _flag(False, "Measure it instead."),
                "num_params": _int(None, "Its parameters.", null=True),
                "hidden_size": _int(None, "Its width.", null=True),
                "num_layers": _int(None, "Its depth.", null=True),
            },
        ),
        "model_info_path": Key("path", null=True, help="File with it."),
        "mp_size": _int(1, "Ranks that share the model."),
        "max_train_batch_size": _int(None, "Largest global batch tried.", null=True),
        "min_train_batch_size": _int(1, "Smallest global batch tried."),
        "max_train_micro_batch_size_per_gpu": _int(1024, "Largest micro batch tried."),
        "min_train_micro_batch_size_per_gpu": _int(1, "Smallest micro batch tried."),
        "num_tuning_micro_batch_sizes": _int(3, "Micro batches tried."),
    },
)

WEIGHT_QUANTIZATION = Section(
    model="deepspeed.inference.config:WeightQuantConfig",
    help="Quantized weights for inference.",
    keys={
        "enabled": _flag(True, "Turn it on."),
        "num_bits": _int(8, "Bits per weight."),
        "q_type": _text("symmetric", "Symmetric around zero or not.", choices=("symmetric", "asymmetric")),
        "q_groups": _int(1, "Groups with a scale of their own."),
        "quantized_initialization": Key("mapping", {}, "Quantize while the model is built."),
        "post_init_quant": Key("mapping", {}, "Quantize after the model was built."),
    },
)

ROOT = Section(
    help="The JSON file.",
    keys={
        "train_batch_size": _int(None, "Samples per optimizer step, over all ranks.", low=1, null=True, auto=True),
        "train_micro_batch_size_per_gpu": _int(None, "Samples per rank and forward pass.", low=1, null=True, auto=True),
        "gradient_accumulation_steps": _int(None, "Forward passes per optimizer step.", low=1, null=True, auto=True),
        "managed_gradient_accumulation": _flag(True, "DeepSpeed counts micro-batches."),
        "optimizer": Section(
            help="Optimizer and its arguments.",
            keys={
                "type": _text(
                    None, "adam, adamw, adagrad, lamb, lion, muon (any case) or a torch.optim class.", required=True
                ),
                "params": Section(open=True, null=True, help="Arguments: lr, betas, eps, weight_decay, ..."),
                "legacy_fusion": _flag(False, "Old fp16 wrapper of FusedAdam.", null=True),
            },
        ),
        "scheduler": Section(
            help="DeepSpeed's or torch's own learning-rate schedule; chatgot.schedule is the better choice.",
            keys={
                "type": _text(
                    None,
                    "LRRangeTest, OneCycle, WarmupLR, WarmupDecayLR, WarmupCosineLR or a torch class.",
                    required=True,
                ),
                "params": Section(open=True, help="Its arguments."),
            },
        ),
        "gradient_clipping": _float(1.0, "Largest global gradient norm; 0: no clipping. Was 0 before 2026.", low=0.0),
        "fp16": FP16,
        "bf16": BF16,
        "torch_autocast": TORCH_AUTOCAST,
        "data_types": DATA_TYPES,
        "communication_data_type": _text(
            None, "Type in which gradients are reduced.", choices=REDUCE_DTYPE_NAMES, fold_case=True, null=True
        ),
        "seq_parallel_communication_data_type": _text(
            "fp32", "The same for sequence parallelism.", choices=REDUCE_DTYPE_NAMES, fold_case=True, null=True
        ),
        "prescale_gradients": _flag(False, "Divide gradients before they are summed.", null=True),
        "gradient_predivide_factor": _float(1.0, "Divide gradients by this before they are summed.", above=0.0),
        "gradient_allreduce_op": _text(
            "mean", "Average or sum gradients over the ranks.", choices=("mean", "sum"), fold_case=True
        ),
        "disable_allgather": _flag(False, "DeepSpeed reads it and does nothing.", null=True),
        "zero_optimization": ZERO_OPTIMIZATION,
        "zero_allow_untested_optimizer": _flag(
            False, "Allow optimizers that DeepSpeed did not test with ZeRO.", null=True
        ),
        "zero_force_ds_cpu_optimizer": _flag(True, "Insist on DeepSpeed's CPU optimizer when offloading.", null=True),
        "activation_checkpointing": ACTIVATION_CHECKPOINTING,
        "checkpoint": CHECKPOINT,
        "steps_per_print": _int(None, "Steps between DeepSpeed's own progress lines; null: none.", low=1, null=True),
        "wall_clock_breakdown": _flag(False, "Log the time of forward, backward and step; slows down."),
        "memory_breakdown": _flag(False, "Log memory at every stage; slows down.", null=True),
        "dump_state": _flag(False, "Print the whole configuration at the start.", null=True),
        "log_level": _text(None, "DeepSpeed's logging level.", choices=LOG_LEVELS, fold_case=True, null=True),
        "disable_python_gc": _flag(False, "Turn Python's garbage collector off.", null=True),
        "dataloader_drop_last": _flag(False, "For DeepSpeed's own data loader, which ChatGoT does not use.", null=True),
        "vocabulary_size": _int(None, "DeepSpeed warns when it is no multiple of 8; nothing else.", low=1, null=True),
        "use_data_before_expert_parallelism": _flag(False, "Order of the parallel groups of experts.", null=True),
        "sequence_parallel_size": _int(None, "Ranks that share a sequence.", low=1),
        "data_parallel_size": _int(None, "Ranks that share the batch.", low=1),
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
        "csv_monitor": CSV_MONITOR,
        "comet": COMET,
        "flops_profiler": FLOPS_PROFILER,
        "comms_logger": COMMS_LOGGER,
        "timers": TIMERS,
        "aio": AIO,
        "compile": COMPILE,
        "hybrid_engine": HYBRID_ENGINE,
        "tensor_parallel": TENSOR_PARALLEL,
        "expert_parallel": EXPERT_PARALLEL,
        "data_efficiency": DATA_EFFICIENCY,
        "pipeline": PIPELINE,
        "autotuning": AUTOTUNING,
        "weight_quantization": WEIGHT_QUANTIZATION,
        "datastates_ckpt": Section(open=True, bare=(False,), help="DataStates checkpoints."),
        "allgather_size": _int(None, "Old spelling beside the old form zero_optimization: true.", above=0),
        "chatgot": Section(open=True, help="What DeepSpeed lacks; see chatgot_section.py."),
    },
)

# deepspeed/runtime/config.py, _REMOVED_TOP_LEVEL_CONFIG_KEYS and _REMOVED_ZERO_CONFIG_KEYS: DeepSpeed refuses these
# even when disabled.
REMOVED = {
    "nebula": "removed from DeepSpeed; delete it (checkpoints are written with torch.save)",
    "compression_training": "removed from DeepSpeed; delete it (there is no replacement)",
    "amp": "removed from DeepSpeed; use fp16, bf16 or torch_autocast instead",
    "quantize_training": "removed from DeepSpeed; delete it (there is no replacement)",
    "sparse_gradients": "removed from DeepSpeed; delete it (embeddings made with sparse=True need no key)",
    "eigenvalue": "removed from DeepSpeed; delete it (there is no replacement)",
    "sparse_attention": "removed from DeepSpeed; delete it (there is no replacement)",
    "elasticity": (
        "removed from DeepSpeed; set train_batch_size, train_micro_batch_size_per_gpu or gradient_accumulation_steps "
        "instead, "
        "and resume on another number of ranks"
    ),
    "graph_harvesting": "removed from DeepSpeed; delete it (there is no replacement)",
    "curriculum_learning": "removed from DeepSpeed; its successor is data_efficiency.data_sampling.curriculum_learning",
    "progressive_layer_drop": "removed from DeepSpeed; delete it (there is no replacement)",
    "zero_optimization.mics_shard_size": "MiCS was removed from DeepSpeed; use zero_optimization.zero_hpz_partition_size instead",
    "zero_optimization.mics_hierarchical_params_gather": "MiCS was removed from DeepSpeed; delete it",
    "zero_optimization.zeropp_loco_param": "removed from DeepSpeed; delete it (quantized gradients work without it)",
}

# Values that ChatGoT accepts of keys it cannot honour, and why not others.
_PARALLEL = "not supported by ChatGoT, whose model is data-parallel only (ZeRO shares out the memory)"
_GPT_DATA = "not supported by ChatGoT, which reads its own data"
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "hybrid_engine.enabled": ((False,), "not supported by ChatGoT, which does no RLHF"),
    "tensor_parallel.autotp_size": ((0, 1), _PARALLEL),
    "tensor_parallel.dtype": ((), "DeepSpeed takes no text here, and ChatGoT does not use the section; delete it"),
    "tensor_parallel.tensor_parallel.tp_size": ((1,), _PARALLEL),
    "expert_parallel.enabled": ((False, None), "not supported by ChatGoT, whose model has no experts"),
    "expert_parallel.load_balance_coeff": ((None,), "DeepSpeed refuses every value but null; delete it"),
    "zero_optimization.zenflow": (
        (None,),
        "not supported by ChatGoT: ZenFlow changes the number of accumulation steps by itself",
    ),
    "data_efficiency.enabled": ((False, None), _GPT_DATA),
    "data_efficiency.data_sampling.enabled": ((False, None), _GPT_DATA),
    "data_efficiency.data_sampling.curriculum_learning.enabled": ((False, None), _GPT_DATA),
    "data_efficiency.data_sampling.dynamic_batching.enabled": ((False, None), _GPT_DATA),
    "data_efficiency.data_routing.enabled": ((False, None), _GPT_DATA),
    "data_efficiency.data_routing.random_ltd.enabled": ((False, None), _GPT_DATA),
    "autotuning.enabled": (
        (False, None),
        "not supported by ChatGoT: autotuning restarts the program through DeepSpeed's own launcher",
    ),
    "weight_quantization.enabled": ((False,), "not supported by ChatGoT: it quantizes weights for inference"),
    "pipeline.stages": (("auto", 1), _PARALLEL),
    "pipeline.partition": (("best",), _PARALLEL),
    "pipeline.seed_layers": ((False,), _PARALLEL),
    "pipeline.activation_checkpoint_interval": ((0,), _PARALLEL),
    "pipeline.pipe_partitioned": ((True,), _PARALLEL),
    "pipeline.grad_partitioned": ((True,), _PARALLEL),
    "sequence_parallel_size": ((1,), _PARALLEL),
    "use_data_before_expert_parallelism": ((False, None), "not supported by ChatGoT, whose model has no experts"),
    "managed_gradient_accumulation": ((True,), "not supported by ChatGoT, whose loop leaves accumulation to DeepSpeed"),
    "disable_allgather": ((False, None), "DeepSpeed reads this key and does nothing; delete it"),
    "checkpoint.load_universal": (
        (False, None),
        "not supported by ChatGoT yet: left in a file it makes every later restart load the old universal checkpoint "
        "again",
    ),
    "checkpoint.writer": (
        (None,),
        "not supported by ChatGoT: DeepSpeed cannot read back what these writers wrote under torch >= 2.6",
    ),
    "checkpoint.use_node_local_storage": (
        (False, None),
        "not supported by ChatGoT: a checkpoint is one folder that all ranks see",
    ),
    "checkpoint.parallel_write.pipeline_stage": ((False,), _PARALLEL),
    "datastates_ckpt": (
        (),
        "not supported by ChatGoT: checkpoints are published whole, by ChatGoT's own protocol; delete it",
    ),
    "zero_optimization.legacy_stage1": ((False,), "DeepSpeed no longer has the old stage 1; delete it"),
    "zero_optimization.cpu_offload_use_pin_memory": (
        (None,),
        "DeepSpeed ignores this key; write pin_memory inside offload_param or offload_optimizer",
    ),
    "compile.passes": ((None, ["z1"], ["z3"]), 'supported by ChatGoT are ["z1"] and ["z3"]'),
    "compile.autoep_non_moe": ((False,), "not supported by ChatGoT, whose model has no experts"),
}

CUDA_ONLY = (
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_nontrainable_weights",
    "zero_optimization.zero_quantized_gradients",
    "aio.use_gds",
    "compile.deepcompile",
    "activation_checkpointing.cpu_checkpointing",
)
"""Flags that fail on the CPU accelerator."""

# --------------------------------------------------------------------------------------------------------------------
# optimizers

_LR = Key("float", 1e-3, "Peak learning rate.", low=0.0)
_EPS = Key("float", 1e-8, "Added to the denominator.", low=0.0)
_DECAY = Key("float", 0.0, "Weight decay.", low=0.0)
_BETAS = Key("betas", [0.9, 0.999], "Decay rates of the two averages.")
_MOMENTUM = Key("float", 0.0, "Decay rate of the velocity.", low=0.0)
_OFF = Key("flag", False)
_MAYBE = Key("flag", None, null=True)
_ADAM = {"lr": _LR, "betas": _BETAS, "eps": _EPS, "weight_decay": _DECAY, "amsgrad": _OFF}
_TORCH = {"foreach": _MAYBE, "maximize": _OFF, "differentiable": _OFF, "capturable": _OFF}
_DS_ADAM_SWITCHES = {
    "torch_adam": _OFF,
    "adam_w_mode": Key("flag", True),
    "fp32_optimizer_states": Key("flag", None, null=True),
}

# Arguments of the optimizer that deepspeed/runtime/engine.py (_configure_basic_optimizer) builds for a type.
# "adam/..." also serves adamw; "torch.X" is torch.optim.X.
OPTIMIZER_PARAMS: dict[str, dict[str, Key]] = {
    "adam/fused": {
        **_ADAM,
        "bias_correction": Key("flag", True),
        "set_grad_none": Key("flag", True),
        **_DS_ADAM_SWITCHES,
    },
    "adam/cpu": {**_ADAM, "bias_correction": Key("flag", True), **_DS_ADAM_SWITCHES},
    "adam/torch": {**_ADAM, **_TORCH, "fused": _MAYBE, **_DS_ADAM_SWITCHES},
    "adagrad/torch": {
        "lr": _LR,
        "lr_decay": Key("float", 0.0, low=0.0),
        "weight_decay": _DECAY,
        "initial_accumulator_value": Key("float", 0.0, low=0.0),
        "eps": _EPS,
        "foreach": _MAYBE,
        "maximize": _OFF,
        "differentiable": _OFF,
        "fused": _MAYBE,
    },
    "adagrad/cpu": {
        "lr": _LR,
        "eps": _EPS,
        "weight_decay": _DECAY,
        "amsgrad": _OFF,
        "fp32_optimizer_states": Key("flag", True),
    },
    "lamb": {
        **_ADAM,
        "bias_correction": Key("flag", True),
        "eps_inside_sqrt": _OFF,
        "max_coeff": Key("float", 10.0, low=0.0),
        "min_coeff": Key("float", 0.01, low=0.0),
    },
    "lion/fused": {"lr": _LR, "betas": _BETAS, "weight_decay": _DECAY, "set_grad_none": Key("flag", True)},
    "lion/cpu": {"lr": _LR, "betas": _BETAS, "weight_decay": _DECAY, "fp32_optimizer_states": Key("flag", True)},
    "muon": {
        "lr": Key("float", None, "Learning rate of both halves.", low=0.0),
        "muon_lr": Key("float", None, "Learning rate of the matrices.", low=0.0),
        "adam_lr": Key("float", None, "Learning rate of everything else.", low=0.0),
        "momentum": Key("float", 0.95, "Muon's momentum.", low=0.0, below=1.0),
        "weight_decay": _DECAY,
        "ns_method": Key("text", "gram", "Newton-Schulz iteration.", choices=("gram", "standard")),
        "betas": _BETAS,
        "eps": _EPS,
        "per_head_muon": _OFF,
        **_DS_ADAM_SWITCHES,
    },
    "torch.ASGD": {
        "lr": _LR,
        "lambd": Key("float", 1e-4),
        "alpha": Key("float", 0.75),
        "t0": Key("float", 1e6),
        "weight_decay": _DECAY,
        **_TORCH,
    },
    "torch.Adadelta": {
        "lr": _LR,
        "rho": Key("float", 0.9, low=0.0, high=1.0),
        "eps": _EPS,
        "weight_decay": _DECAY,
        **_TORCH,
    },
    "torch.Adafactor": {
        "lr": _LR,
        "beta2_decay": Key("float", -0.8, high=0.0),
        "eps": Key("numbers", None),
        "d": Key("float", 1.0, low=1.0),
        "weight_decay": _DECAY,
        "foreach": _MAYBE,
        "maximize": _OFF,
    },
    "torch.Adamax": {"lr": _LR, "betas": _BETAS, "eps": _EPS, "weight_decay": _DECAY, **_TORCH},
    "torch.NAdam": {
        "lr": _LR,
        "betas": _BETAS,
        "eps": _EPS,
        "weight_decay": _DECAY,
        "momentum_decay": Key("float", 4e-3, low=0.0),
        "decoupled_weight_decay": _OFF,
        **_TORCH,
    },
    "torch.RAdam": {
        "lr": _LR,
        "betas": _BETAS,
        "eps": _EPS,
        "weight_decay": _DECAY,
        "decoupled_weight_decay": _OFF,
        **_TORCH,
    },
    "torch.RMSprop": {
        "lr": _LR,
        "alpha": Key("float", 0.99, low=0.0),
        "eps": _EPS,
        "weight_decay": _DECAY,
        "momentum": _MOMENTUM,
        "centered": _OFF,
        **_TORCH,
    },
    "torch.Rprop": {"lr": _LR, "etas": Key("numbers", None), "step_sizes": Key("numbers", None), **_TORCH},
    "torch.SGD": {
        "lr": _LR,
        "momentum": _MOMENTUM,
        "dampening": Key("float", 0.0),
        "weight_decay": _DECAY,
        "nesterov": _OFF,
        "maximize": _OFF,
        "foreach": _MAYBE,
        "differentiable": _OFF,
        "fused": _MAYBE,
    },
}

DEEPSPEED_OPTIMIZERS = ("adam", "adamw", "adagrad", "lamb", "lion", "muon", "muadam", "muadamw", "musgd")
TORCH_OPTIMIZERS = tuple(name.removeprefix("torch.") for name in OPTIMIZER_PARAMS if name.startswith("torch."))
ZERO_TESTED_OPTIMIZERS = ("adam", "adamw", "adagrad", "lion", "muon")
"""deepspeed/runtime/zero/utils.py, ZERO_SUPPORTED_OPTIMIZERS."""
CUDA_OPTIMIZERS = ("lamb", "lion")
"""Their fused kernels exist for CUDA only; lion has a CPU version under optimizer offload."""
REFUSED_OPTIMIZERS = {
    "muadam": "needs the mup package and base shapes that ChatGoT's model does not set",
    "muadamw": "needs the mup package and base shapes that ChatGoT's model does not set",
    "musgd": "needs the mup package and base shapes that ChatGoT's model does not set",
    "LBFGS": "needs a closure, which DeepSpeed's step() does not give",
    "SparseAdam": "needs sparse gradients, which ChatGoT's model does not have",
}

# --------------------------------------------------------------------------------------------------------------------
# schedulers

_COUNT = Key("int", None, low=1)
_RATE = Key("numbers", None, low=0.0)
_LAST = Key("int", -1, low=-1)
_WARMUP_TYPE = Key("text", "log", "Shape of the warm-up.", choices=("log", "linear"))


def _must(key: Key) -> Key:
    return Key(key.kind, key.default, key.help, low=key.low, required=True)


# Arguments of the schedulers in deepspeed/runtime/lr_schedules.py and of those in torch.optim.lr_scheduler that a JSON
# can describe.
SCHEDULER_PARAMS: dict[str, dict[str, Key]] = {
    "LRRangeTest": {
        "lr_range_test_min_lr": _RATE,
        "lr_range_test_step_size": _COUNT,
        "lr_range_test_step_rate": Key("float", 1.0, low=0.0),
        "lr_range_test_staircase": _OFF,
        "last_batch_iteration": _LAST,
    },
    "OneCycle": {
        "cycle_min_lr": _must(_RATE),
        "cycle_max_lr": _must(_RATE),
        "decay_lr_rate": Key("float", 0.0, low=0.0),
        "cycle_first_step_size": _COUNT,
        "cycle_second_step_size": Key("int", None, low=1, null=True),
        "cycle_first_stair_count": Key("int", 0, low=0),
        "cycle_second_stair_count": Key("int", None, low=0, null=True),
        "decay_step_size": Key("int", 0, low=0),
        "cycle_momentum": Key("flag", True),
        "cycle_min_mom": Key("float", 0.8, low=0.0),
        "cycle_max_mom": Key("float", 0.9, low=0.0),
        "decay_mom_rate": Key("float", 0.0, low=0.0),
        "last_batch_iteration": _LAST,
    },
    "WarmupLR": {
        "warmup_min_lr": _RATE,
        "warmup_max_lr": Key("numbers", None, low=0.0, null=True),
        "warmup_num_steps": _COUNT,
        "warmup_type": _WARMUP_TYPE,
        "last_batch_iteration": _LAST,
    },
    "WarmupDecayLR": {
        "total_num_steps": _must(_COUNT),
        "warmup_min_lr": _RATE,
        "warmup_max_lr": _RATE,
        "warmup_num_steps": _COUNT,
        "warmup_type": _WARMUP_TYPE,
        "last_batch_iteration": _LAST,
    },
    "WarmupCosineLR": {
        "total_num_steps": _must(_COUNT),
        "warmup_min_ratio": Key("float", 0.0, low=0.0),
        "warmup_num_steps": _COUNT,
        "cos_min_ratio": Key("float", 1e-4, low=0.0),
        "warmup_type": _WARMUP_TYPE,
        "last_batch_iteration": _LAST,
    },
    "ConstantLR": {"factor": Key("float", 1 / 3, low=0.0, high=1.0), "total_iters": _COUNT, "last_epoch": _LAST},
    "CosineAnnealingLR": {"T_max": _must(_COUNT), "eta_min": Key("float", 0.0, low=0.0), "last_epoch": _LAST},
    "CosineAnnealingWarmRestarts": {
        "T_0": _must(_COUNT),
        "T_mult": _COUNT,
        "eta_min": Key("float", 0.0, low=0.0),
        "last_epoch": _LAST,
    },
    "CyclicLR": {
        "base_lr": _must(_RATE),
        "max_lr": _must(_RATE),
        "step_size_up": _COUNT,
        "step_size_down": Key("int", None, low=1, null=True),
        "mode": Key("text", "triangular", choices=("triangular", "triangular2", "exp_range")),
        "gamma": Key("float", 1.0, low=0.0),
        "scale_mode": Key("text", "cycle", choices=("cycle", "iterations")),
        "cycle_momentum": Key("flag", True),
        "base_momentum": Key("numbers", 0.8, low=0.0),
        "max_momentum": Key("numbers", 0.9, low=0.0),
        "last_epoch": _LAST,
    },
    "ExponentialLR": {"gamma": Key("float", None, low=0.0, required=True), "last_epoch": _LAST},
    "LinearLR": {
        "start_factor": Key("float", 1 / 3, above=0.0, high=1.0),
        "end_factor": Key("float", 1.0, low=0.0, high=1.0),
        "total_iters": _COUNT,
        "last_epoch": _LAST,
    },
    "MultiStepLR": {
        "milestones": Key("numbers", None, low=0.0, required=True),
        "gamma": Key("float", 0.1, low=0.0),
        "last_epoch": _LAST,
    },
    "OneCycleLR": {
        "max_lr": _must(_RATE),
        "total_steps": Key("int", None, low=1, null=True),
        "epochs": Key("int", None, low=1, null=True),
        "steps_per_epoch": Key("int", None, low=1, null=True),
        "pct_start": Key("float", 0.3, low=0.0, high=1.0),
        "anneal_strategy": Key("text", "cos", choices=("cos", "linear")),
        "cycle_momentum": Key("flag", True),
        "base_momentum": Key("numbers", 0.85, low=0.0),
        "max_momentum": Key("numbers", 0.95, low=0.0),
        "div_factor": Key("float", 25.0, above=0.0),
        "final_div_factor": Key("float", 1e4, above=0.0),
        "three_phase": _OFF,
        "last_epoch": _LAST,
    },
    "PolynomialLR": {"total_iters": _COUNT, "power": Key("float", 1.0), "last_epoch": _LAST},
    "StepLR": {"step_size": _must(_COUNT), "gamma": Key("float", 0.1, low=0.0), "last_epoch": _LAST},
}

REFUSED_SCHEDULERS = {
    "LambdaLR": "needs a Python function",
    "MultiplicativeLR": "needs a Python function",
    "ChainedScheduler": "needs scheduler objects",
    "SequentialLR": "needs scheduler objects",
    "ReduceLROnPlateau": "needs a metric, which DeepSpeed's step() does not give",
    "SWALR": "needs averaged weights, which ChatGoT does not keep",
}


def walk(section: Section = ROOT, prefix: str = "") -> dict[str, Key | Section]:
    """Every section and key by its dotted name, aliases left out."""
    found: dict[str, Key | Section] = {}
    for name, node in section.keys.items():
        found[prefix + name] = node
        if isinstance(node, Section):
            found.update(walk(node, f"{prefix}{name}."))
    return found


NODES = walk()


def spellings(section: Section) -> dict[str, str]:
    """Every spelling that a section accepts -> the documented one."""
    names = {name: name for name in section.keys}
    names.update({node.alias: name for name, node in section.keys.items() if node.alias})
    return names
