"""The cases that a benchmark compares: networks, and the passes or steps of them that are timed."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qsd
from qsd.commands.benchmark.direct import DirectlyTrained
from qsd.commands.benchmark.onnx_file import OnnxFile
from qsd.commands.benchmark.precisions import arithmetic, autocast, suffix
from qsd.commands.benchmark.settings import Settings
from qsd.distillation import AttentionRecorder, Teacher, attention_loss, logits_loss
from qsd.models import CsdFormer
from qsd.models.variants import family_of
from qsd.spiking.conversion import convert


@dataclass
class Case:
    """A network and a job of it to measure.

    Attributes:
        name: The name in tables.
        network: Builds the network.
        job: Makes the function that is timed, given the network.
        versus: The cases that the time is divided by, each with the target of the ratio, if there is one.
        seconds: The measured times.
        allocator_peak: Bytes that PyTorch's allocator held at most in a run, beyond those before it, on CUDA devices.
        profile: A table of the kernels of a run, where it was asked for.
    """

    name: str
    network: Callable[[], Any]
    job: Callable[[Any], Callable[[], Any]]
    versus: dict[str, float | None] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    allocator_peak: int | None = None
    profile: str | None = None


def cases_of(suite: str, settings: Settings) -> list[Case]:
    """The cases of a suite.

    Args:
        suite: ``"inference"``, ``"training"`` or ``"export"``.
        settings: The settings of the benchmark.
    """
    return {"inference": _inference, "training": _training, "export": _export}[suite](settings)


def size_cases(settings: Settings, name: str, images: Tensor, labels: Tensor) -> list[Case]:
    """A count-domain pass and training steps of one model on one size of images.

    Args:
        settings: The settings of the benchmark.
        name: The registered name of the model.
        images: Images ``[B, C, H, W]``.
        labels: Labels ``[B]``.
    """

    def step(network: nn.Module) -> Callable[[], Any]:
        return _training_step(network, images, labels)

    return [
        Case(
            "count domain",
            lambda: _unmerged(_trained_like(settings.model(name=name), images)),
            lambda network: lambda: network(images),
        ),
        Case("training step, quantized", lambda: settings.model(name=name), step),
        Case("training step, float twin", lambda: settings.model("_ann", name), step),
    ]


def _trained_like(model: nn.Module, images: Tensor) -> nn.Module:
    """Give a fresh model batch statistics of its own, so that its neurons fire, and put it in evaluation mode."""
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(images)
    return model.eval()


def _unmerged(model: nn.Module) -> qsd.SpikingNetwork:
    return convert(model, None, False, None, None, check=False)


def _with_integers(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    qsd.set_integer_operands(model)
    return model


def _inference(settings: Settings) -> list[Case]:
    """Evaluation of the trained network and of its converted forms, on images in channels-last layout."""
    images = settings.images()

    @cache
    def trained() -> nn.Module:
        return _trained_like(settings.model(), images)

    @cache
    def twin() -> nn.Module:
        return _trained_like(settings.model("_ann"), images)

    @cache
    def spiking(merge: bool) -> qsd.SpikingNetwork:
        return convert(trained(), None, merge, None, None, check=False)

    def evaluate(network: nn.Module) -> Callable[[], Any]:
        return _evaluation(network, images, "float32")

    def simulate(network: qsd.SpikingNetwork) -> Callable[[], Any]:
        return arithmetic("float32")(lambda: network.simulate(images))

    limit = settings.time_steps + (0.3 if settings.device.type == "cuda" else 0.5)
    merged = "count domain, merged kernels"
    cases = [
        Case("float twin", twin, evaluate),
        Case("quantized", trained, evaluate, {"float twin": None}),
        Case("count domain", lambda: spiking(False), evaluate, {"quantized": 1.0}),
        Case(merged, lambda: spiking(True), partial(_merged_counts, images), {"count domain": None}),
        Case("stepping", lambda: spiking(False), simulate, {"count domain": limit}),
        Case("stepping, merged kernels", lambda: spiking(True), simulate, {merged: limit}),
        Case("conversion", trained, lambda network: lambda: qsd.to_spike_driven(network)),
    ]
    for precision in (name for name in settings.precisions if name != "float32"):
        job, end = partial(_evaluation, images=images, precision=precision), suffix(precision)
        beside, decoded = f"float twin{end}", f"quantized{end}"
        cases += [Case(beside, twin, job), Case(decoded, trained, job, {beside: None})]
        cases.append(Case(f"integer operands{end}", lambda: _with_integers(trained()), job, {decoded: None}))
        cases.append(Case(f"count domain{end}", lambda: spiking(False), job, {beside: 1.0}))
        cases[2].versus[beside] = None
    for how in ["graph"] * (settings.device.type == "cuda") + ["compiled"] * settings.compile:
        for name, run in (("count domain", evaluate), *([("stepping", simulate)] if how == "graph" else [])):
            job = partial(_recorded, run, how)
            cases.append(Case(f"{name}, {how}", lambda: _unmerged(trained()), job, {name: None}))
    return cases


def _evaluation(network: nn.Module, images: Tensor, precision: str) -> Callable[[], Any]:
    """A pass without gradients."""

    @torch.no_grad()
    def run() -> Any:
        with arithmetic(precision), autocast(precision, images.device):
            return network(images)

    return run


def _recorded(job: Callable[[Any], Callable[[], Any]], how: str, network: qsd.SpikingNetwork) -> Callable[[], Any]:
    """A job whose run is recorded, as a compiled program or as it is, and replayed whenever it is timed."""
    run = job(network)
    with network.graphs.recording(compile=how == "compiled"):
        run()
    return run


def _merged_counts(images: Tensor, network: qsd.SpikingNetwork) -> Callable[[], Any]:
    """A count-domain pass with merged kernels, which the count domain otherwise evaluates factor by factor."""

    @arithmetic("float32")
    def run() -> None:
        for chain in network.chains().values():
            chain.merged_counts = True
        network(images)
        for chain in network.chains().values():
            chain.merged_counts = False

    return run


def _export(settings: Settings) -> list[Case]:
    """Images one by one through exported files, beside the float twin in PyTorch and in ONNX Runtime."""
    images = settings.images().contiguous()  # ranges are measured on all of them

    @cache
    def twin() -> nn.Module:
        return _trained_like(settings.model("_ann"), images)

    @cache
    def twin_file() -> OnnxFile:
        return OnnxFile.of_float(twin(), images)

    @cache
    def spiking() -> qsd.SpikingNetwork:
        return _unmerged(_trained_like(settings.model(), images))

    def evaluate(network: Callable[[Tensor], Any]) -> Callable[[], Any]:
        return torch.no_grad()(lambda: [network(image) for image in images.split(1)])

    float_file, plain = "float twin, ONNX Runtime", "float twin, plain 8 bits, ONNX Runtime"
    both: dict[str, float | None] = {"float twin": None, float_file: None}
    integer_targets: dict[str, float | None] = {"float twin": 1 / 3.5, float_file: 1 / 2}
    return [
        Case("float twin", twin, evaluate),
        Case(float_file, twin_file, evaluate, {"float twin": None}),
        Case(plain, lambda: twin_file().quantized(images), evaluate, both),
        Case("count domain", spiking, evaluate, {"float twin": None}),
        Case("float file", lambda: OnnxFile.of_spiking(spiking(), images, False), evaluate, both),
        Case("integer file", lambda: OnnxFile.of_spiking(spiking(), images, True), evaluate, integer_targets),
    ]


def _training(settings: Settings) -> list[Case]:
    """Training steps: float twin and quantized network, eager and compiled, with a teacher, and direct training."""
    images = settings.images()
    labels = torch.randint(settings.num_classes, (len(images),), device=images.device)

    def lean(enable: bool) -> nn.Module:
        model: nn.Module = settings.model()
        qsd.set_lean(model, enable)
        return model

    def direct() -> nn.Module:
        model = DirectlyTrained(settings.name, settings.time_steps, num_classes=settings.num_classes)
        return model.to(settings.device)

    other = "lean, eager" if images.is_cuda else "plain, eager"
    cases = []
    for precision in settings.precisions:
        step, end = partial(_training_step, images=images, labels=labels, precision=precision), suffix(precision)
        cases += _beside_the_twin(settings, step, end)
        twin: dict[str, float | None] = {f"float twin, eager{end}": None}
        cases.append(Case(f"{other}{end}", partial(lean, other == "lean, eager"), step, twin))
        cases.append(Case(f"direct, eager{end}", direct, step, twin))
    taught = partial(_distillation_step, teacher=lambda: settings.model("_ann"), images=images, labels=labels)
    end = suffix(settings.precisions[0])
    if not end:
        cases.append(Case("distilled, eager", settings.model, taught, {"quantized, eager": 1.45}))
    return cases


def _beside_the_twin(settings: Settings, step: Callable[[Any], Callable[[], Any]], end: str) -> list[Case]:
    """The float twin's step and the quantized network's, eager and compiled, in one precision."""
    csdformer = family_of(settings.name).cls is CsdFormer
    if settings.device.type == "cuda":
        eager, compiled = (1.15, 1.05) if csdformer else (1.1, 1.0)
    else:
        eager, compiled = (1.25, 1.1) if csdformer else (1.2, 1.1)

    def network(kind: str, how: str) -> nn.Module:
        model: nn.Module = settings.model(kind)
        if how == "compiled":
            model.compile(dynamic=False)
        return model

    cases = []
    for how, limit in (("eager", eager), *([("compiled", compiled)] if settings.compile else [])):
        twin = f"float twin, {how}{end}"
        versus: dict[str, float | None] = {twin: limit}
        if how == "eager":
            versus[f"direct, eager{end}"] = 0.4 if csdformer else None
        cases.append(Case(twin, partial(network, "_ann", how), step))
        cases.append(Case(f"quantized, {how}{end}", partial(network, "", how), step, versus))
    return cases


def _training_step(network: nn.Module, images: Tensor, labels: Tensor, precision: str = "float32") -> Callable[[], Any]:
    """A step of AdamW on one batch."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)
    scaler = torch.amp.GradScaler(images.device.type, enabled=precision == "fp16")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with arithmetic(precision):
            with autocast(precision, images.device):
                loss = F.cross_entropy(network(images), labels)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    return step


def _distillation_step(
    network: nn.Module, teacher: Callable[[], nn.Module], images: Tensor, labels: Tensor
) -> Callable[[], Any]:
    """A step of AdamW with a teacher of attention and logits."""
    network.train()
    frozen, recorder = Teacher(teacher(), "float twin"), AttentionRecorder(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        recorder.start()
        logits = network(images)
        taught, maps = frozen(images)
        terms: Sequence[Tensor] = list(attention_loss(recorder.take(), maps).values())
        loss = F.cross_entropy(logits, labels) + 0.01 * sum(terms) + logits_loss(logits, taught)
        loss.backward()
        optimizer.step()

    return step
