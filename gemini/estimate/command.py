"""``gemini-stat estimate MODEL``: what a training will need, before anything is allocated."""

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from gemini.arguments.brief import brief
from gemini.arguments.command_line import option
from gemini.arguments.places import Name
from gemini.arguments.rules import Size, Whole
from gemini.chunk import FORMATS, BufferSpec, MemoryMap, Tier
from gemini.config import ACTIVATION_POLICIES, PRECISIONS, GeminiConfig
from gemini.nn.optimizer import HybridAdam
from gemini.nn.optimizer.acceptance import accepted
from gemini.packing.quantised import quantised_parameters
from gemini.quantization import Quantization
from gemini.sizes import format_bytes
from gemini.stat.console import Exit, Usage, print_json
from gemini.stat.estimate_outputs import Estimate, Solved, TierNeed
from gemini.stat.text import count, seconds
from gemini.telemetry.discovery import NoRun

from .activations import Ways
from .bench import read_speed
from .demand import Demand, Machine, ModelData, TierDemand, arguments, room_for_copies, with_machine
from .solve import demand_of, solve_batch_size, solve_memory, solve_ranks, solve_seq_len
from .step_model import Training, step_seconds
from .subject import NotFound, Subject, find_subject

HELP = (
    "What training MODEL will need on each tier, whether it fits, and the arguments to set. Allocates nothing. "
    "MODEL is a config.json of transformers, its folder, a model type such as gpt2, a cached name on the hub, "
    "or module:function."
)
TARGET = "MODEL"
TARGET_HELP = "what to train, see above"
_MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-b", "--batch-size", type=option(Whole(1)), default=1, metavar="N", help="samples a step, of each rank (1)"
    )
    parser.add_argument(
        "-s", "--seq-len", type=option(Whole(1)), default=128, metavar="N", help="tokens a sample (128)"
    )
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument(
        "--activation-policy", choices=ACTIVATION_POLICIES, default="keep", help="as GeminiPlugin's (keep)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="as GeminiPlugin's (bf16)")
    parser.add_argument(
        "--optimizer", nargs="+", default=["AdamW"], metavar=("NAME", "OPTION=VALUE"),
        help="of torch.optim, such as: SGD momentum=0.9, or HybridAdam states=8bit (AdamW)",
    )  # fmt: skip
    parser.add_argument("--split-master", action="store_true", help="as GeminiPlugin's; HybridAdam or AdamW in bf16")
    parser.add_argument("--quantize", choices=tuple(FORMATS), help="as GeminiPlugin's, for a model with frozen layers")
    parser.add_argument(
        "--gpu", type=option(Size()), metavar="SIZE", help="memory of a rank's accelerator; nothing: train on the CPU"
    )
    parser.add_argument(
        "--ram",
        type=option(Size()),
        metavar="SIZE",
        help="a machine's RAM for this training beside the libraries (what is free here)",
    )
    parser.add_argument(
        "--disk", type=option(Size()), metavar="SIZE", help="room of a machine's disk tier; nothing: no disk tier"
    )
    parser.add_argument(
        "--ranks", type=option(Whole(1)), default=1, metavar="N", help="processes that keep the model (1)"
    )
    parser.add_argument(
        "--per-node",
        type=option(Whole(1)),
        metavar="M",
        help="of them on a machine, whose RAM and disk they share (all)",
    )
    parser.add_argument(
        "--offload-dir", type=option(Name()), metavar="FOLDER", help="its folder, for the arguments that are printed"
    )
    parser.add_argument(
        "--set", type=assignment, action="append", default=[], metavar="NAME=VALUE", help="a field of the configuration"
    )
    parser.add_argument(
        "--solve", choices=("batch-size", "seq-len", "host", "disk", "ranks"), help="find the best that fits"
    )


def run(options: argparse.Namespace) -> Exit:
    if options.target is None:
        raise Usage("which model? gemini-stat estimate MODEL, such as gpt2 or ./config.json")
    machine = _machine(options, options.ranks)
    slots = _slots(*options.optimizer)
    config = _config(options, slots)
    try:
        subject = find_subject(options.target, dict(options.set))
        data = _data(subject, config, slots)
        activations = Ways(
            subject,
            config.dtype_of(torch.float32),
            options.checkpointing,
            options.activation_policy,
            machine.disk_bytes,
        )
    except NotFound as error:
        raise NoRun(str(error)) from error
    solved: Solved | None = None
    if options.solve is not None:
        solved, machine = _solve(options, data, activations, machine)
    found = demand_of(data, activations, machine, options.batch_size, options.seq_len)
    answer = _answer(options, subject, data, found, machine, solved)
    if options.json:
        print_json(answer)
    else:
        _show(options, found, answer)
    return Exit.OK if found.fits and (solved is None or solved.value) else Exit.NEGATIVE


def _solve(options: argparse.Namespace, data: ModelData, activations: Ways, machine: Machine) -> tuple[Solved, Machine]:
    """Puts the answer into the options or the machine, so that the rest is about it."""
    name = options.solve
    try:
        if name == "batch-size":
            value = solve_batch_size(data, activations, machine, options.seq_len)
            options.batch_size = value or options.batch_size
        elif name == "seq-len":
            value = solve_seq_len(data, activations, machine, options.batch_size)
            options.seq_len = value or options.seq_len
        elif name == "ranks":
            non_model = activations.peak_bytes(options.batch_size, options.seq_len)
            value = solve_ranks(data, non_model, partial(_machine, options)) or 0
            machine = _machine(options, value) if value else machine
        else:
            non_model = activations.peak_bytes(options.batch_size, options.seq_len)
            of_rank = solve_memory(data, non_model, machine, name) or 0
            value = of_rank * machine.neighbours
            if value:
                machine = with_machine(machine, **{{"host": "ram_bytes", "disk": "disk_bytes"}[name]: of_rank})
    except ValueError as error:
        raise Usage(f"--solve {name}: {error}") from error
    return Solved(name, value), machine


def _answer(
    options: argparse.Namespace,
    subject: Subject,
    data: ModelData,
    found: Demand,
    machine: Machine,
    solved: Solved | None,
) -> Estimate:
    times = _step_seconds(options, data, found, machine) if found.fits else {}
    return Estimate(
        model=subject.name,
        fits=found.fits,
        parameters=data.numel,
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        precision=options.precision,
        optimizer=" ".join(options.optimizer),
        checkpointing=options.checkpointing,
        activation_policy=options.activation_policy,
        non_model_bytes=found.tiers[machine.memory.compute_tier].non_model_bytes,
        ranks=machine.ranks,
        ranks_per_node=machine.neighbours,
        nodes=machine.nodes,
        tiers={tier.value: _need(of_tier) for tier, of_tier in found.tiers.items()},
        node_tiers={tier.value: _need(of_tier.times(machine.neighbours)) for tier, of_tier in found.tiers.items()},
        device_and_host_are_one=machine.memory is MemoryMap.UNIFIED,
        terms=dict(found.terms),
        arguments=arguments(found, data.config, options.offload_dir and str(options.offload_dir))
        if found.fits
        else None,
        step_seconds_floor=times.get("step"),
        step_seconds_floor_by={name: taken for name, taken in times.items() if name != "step"},
        solved=solved,
        problem=found.problem,
        remarks=_remarks(machine, found.tiers[Tier.DISK].model_bytes > 0, found.fits and "step" not in times),
    )


def _need(demand: TierDemand) -> TierNeed:
    return TierNeed(
        model_bytes=demand.model_bytes,
        non_model_bytes=demand.non_model_bytes,
        peak_bytes=demand.peak_bytes,
        capacity_bytes=demand.capacity_bytes,
        fits=demand.fits,
    )


def _step_seconds(options: argparse.Namespace, data: ModelData, found: Demand, machine: Machine) -> dict[str, float]:
    """The same packing once more, for what it moves and when."""
    limits = {tier: found.limits.get(f"{tier.value}_memory", 0) for tier in Tier}
    packing = data.pack(limits, machine.memory, machine.ranks)
    training = Training(
        tokens=options.batch_size * options.seq_len,
        checkpointing=options.checkpointing,
        state_bytes=data.state_bytes,
        in_backward=data.config.update_in_backward,
        ahead=machine.ranks == 1 and data.config.precision != "fp16" and not data.config.max_norm,
        prefetched=data.config.max_prefetch,
    )
    return step_seconds(data.model, packing, room_for_copies(packing, limits), training, read_speed())


def _remarks(machine: Machine, uses_disk: bool, is_without_time: bool) -> list[str]:
    found = ["not counted: the interpreter and libraries, data loader workers, what the user's own code keeps"]
    if machine.memory is not MemoryMap.UNIFIED:
        found.append("activations were tracked on fake CPU tensors; CUDA kernels may need other temporaries")
    if machine.ranks > 1:
        found.append("not counted: the time of messages between ranks, and the memory that they take on their way")
    if uses_disk:
        found.append("not counted: results of updates ahead of a step, at most as much disk again, where there is room")
    if is_without_time:
        found.append("no step time: gemini-stat bench FOLDER measures this machine, and the disk of the folder, first")
    return found


def _show(options: argparse.Namespace, found: Demand, answer: Estimate) -> None:
    mode = "checkpointed" if options.checkpointing else "not checkpointed"
    if options.activation_policy != "keep":
        mode += f", saved tensors: {options.activation_policy}"
    print(f"{answer.model}: {count(answer.parameters)} parameters, {options.precision}, {answer.optimizer}")
    several = answer.ranks > 1
    print(f"batch {options.batch_size} x {options.seq_len} tokens{' a rank' if several else ''}, {mode}")
    if several:
        machines = f"{answer.nodes} machine{'s' if answer.nodes > 1 else ''}"
        print(f"{answer.ranks} ranks on {machines}, up to {answer.ranks_per_node} on each")
    if answer.solved is not None:
        value = answer.solved.value
        shown = f"{value:,}"
        if options.solve in ("host", "disk"):
            shown = format_bytes(value or 0) + (" a machine" if several else "")
        print(f"solved: {options.solve} {shown if value else 'has no answer: it does not fit whatever it is'}")
    head = f"{'model data':>12}{'non-model':>12}{'peak':>12}{'there is':>12}"
    print(f"\n{'each rank' if several else '':<13}{head}")
    for tier, of_tier in found.tiers.items():
        if tier is not Tier.DEVICE or not answer.device_and_host_are_one:
            _show_tier(tier, of_tier)
    if several:
        print(f"{'a machine':<13}")
        for tier, of_tier in found.tiers.items():
            if tier is not Tier.DEVICE:  # each rank has an accelerator of its own
                _show_tier(tier, of_tier.times(answer.ranks_per_node))
    terms = found.terms
    if "masters" in terms:
        parts = ("masters", "moments", "gradients", "staging", "padding_within_these", "load_peak_beyond_homes")
        names = {"moments": "optimizer states"}
        listed = ", ".join(f"{names.get(n, n.replace('_', ' '))} {format_bytes(terms[n])}" for n in parts)
        print(f"\n{'of each rank: ' if several else ''}{listed}")
        print(f"{terms['chunk_count']} chunks of up to {count(terms['chunk_numel'])} elements")
    if answer.step_seconds_floor is not None:
        by = ", ".join(f"{name} {seconds(value)}" for name, value in answer.step_seconds_floor_by.items())
        print(f"a step takes {seconds(answer.step_seconds_floor)} or more: {by}")
    if found.fits:
        print(f"\nFITS. {answer.arguments}")
    else:
        print(f"\nDOES NOT FIT. {found.problem or 'activations alone leave too little room'}")
    for remark in answer.remarks:
        print(f"- {remark}")


def _show_tier(tier: Tier, demand: TierDemand) -> None:
    if not demand.peak_bytes and not demand.capacity_bytes:
        return
    cells = (demand.model_bytes, demand.non_model_bytes, demand.peak_bytes, demand.capacity_bytes)
    verdict = "fits" if demand.fits else "DOES NOT FIT"
    print(f"{tier.value:<13}" + "".join(f"{format_bytes(cell):>12}" for cell in cells) + f"  {verdict}")


def _slots(name: str, *assignments: str) -> tuple[BufferSpec, ...]:
    """What the optimizer of this name, with these options, keeps of each element."""
    cls = HybridAdam if name == HybridAdam.__name__ else getattr(torch.optim, name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise Usage(f"--optimizer expects the name of one of torch.optim or HybridAdam, got {name!r}")
    try:
        optimizer = accepted(cls([torch.zeros(1)], **dict(assignment(text) for text in assignments)))
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        raise Usage(f"--optimizer {name}: {error}") from error
    (group,) = optimizer.param_groups
    return optimizer.rules.of_group(group).slots(group)


def _config(options: argparse.Namespace, slots: Sequence[BufferSpec]) -> GeminiConfig:
    if options.split_master and not any(slot.has_spare_sign for slot in slots):
        raise Usage(f"--split-master needs HybridAdam or AdamW, got --optimizer {' '.join(options.optimizer)}")
    try:
        return GeminiConfig(
            precision=options.precision,
            split_master=options.split_master,
            activation_policy=options.activation_policy,
            quantization=Quantization.of(options.quantize),
        )
    except ValueError as error:
        raise Usage(str(error)) from error


def _data(subject: Subject, config: GeminiConfig, slots: Sequence[BufferSpec]) -> ModelData:
    data = ModelData(subject, config, slots)
    if data.config.quantization is not None:
        trained = {id(p) for p in data.model.parameters() if p.requires_grad}
        try:
            quantised_parameters(data.model, data.config.quantization, trained)
        except ValueError as error:
            raise Usage(str(error)) from error
    return data


def _machine(options: argparse.Namespace, ranks: int) -> Machine:
    """What each of several ranks has, by the options: those on one machine share its RAM and disk."""
    from gemini.lease.room import NON_MODEL_HOST_BYTES
    from gemini.memory.tracker import host_budget

    per_node = options.per_node or ranks
    here = min(ranks, per_node)
    if options.ram is None:
        ram_bytes = host_budget(spare_bytes=NON_MODEL_HOST_BYTES, ranks=here).bytes
    else:
        ram_bytes = options.ram // here
    return Machine(
        device_bytes=None if options.gpu is None else options.gpu,
        ram_bytes=ram_bytes,
        disk_bytes=0 if options.disk is None else options.disk // here,
        ranks=ranks,
        per_node=per_node,
    )


def assignment(text: str) -> tuple[str, Any]:
    """A name, and a value that is JSON or else a text."""
    name, separator, value = text.partition("=")
    if not separator or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {brief(text)}")
    try:
        parsed = json.loads(value)
    except ValueError:
        return name, value
    return name, value if isinstance(parsed, float) and not math.isfinite(parsed) else parsed
