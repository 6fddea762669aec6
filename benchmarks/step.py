"""A whole distillation step and its parts against a plain loop: ``python benchmarks/step.py``.

The plain loop is what the formulas say when written down directly, the way published code does:
NCHW, autocast (float16 with a gradient scaler on CUDA), full-size logits, all probabilities sorted,
memory as torch leaves it.
Ours is the trainer's own step, with its check and its curves. Same networks, same random images,
one process; medians after warming up. Prints two tables and the share of the chip's peak that is
reached (measured with one large matrix product), and writes all of it as JSON, with hardware,
versions and commit, to benchmarks/results/.

On CUDA the sizes of the Cityscapes recipes (512 x 1024, batch 16), on a CPU 360 x 360, batch 4.
``--methods`` adds a row for each method; ``--profile`` the kernels that take most of the time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rdd_pipeline.allocation import freed_memory_kept
from rdd_pipeline.config import NetworkParams, RddParams, RecipeParams, TrainerParams
from rdd_pipeline.data.images import Images
from rdd_pipeline.data.labels import LabelSet, make_lookup
from rdd_pipeline.data.loading import Batch
from rdd_pipeline.distillation.methods import METHODS
from rdd_pipeline.losses.cross_entropy import cross_entropy_loss
from rdd_pipeline.losses.rdd import tfe_loss, tse_loss
from rdd_pipeline.networks import NetworkCheckpoint, NetworkOutput, build_network
from rdd_pipeline.networks.frozen import freeze
from rdd_pipeline.training.build import build
from rdd_pipeline.training.device import set_up
from rdd_pipeline.training.job import TrainingJob
from rdd_pipeline.training.loop import Trainer, on_device
from rdd_pipeline.training.training import Training

CLASSES = 19
ITERATIONS = 1000
IN_TFE, IN_TSE = 5, 500
RESULTS = Path(__file__).parent / "results"
LABELS = LabelSet(
    name="random",
    names=tuple(f"class {number}" for number in range(CLASSES)),
    colors=tuple((number, number, number) for number in range(CLASSES)),
    lookup=make_lookup({number: number for number in range(CLASSES)}, ignored=(255,)),
)


class Bench:
    """One machine, two networks, one batch; collects rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.on_cuda = self.device.type == "cuda"
        set_up(TrainerParams(threads=options.threads), self.device)
        torch.manual_seed(0)
        images, (height, width) = options.batch, options.size
        shape = (images, 3, height, width)
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8)
        coarse = torch.randint(0, CLASSES, (images, 1, height // 32, width // 32))
        labels = F.interpolate(coarse.float(), size=(height, width))[:, 0].to(torch.uint8)
        labels[torch.rand(labels.shape) < 0.05] = 255
        self.labels = labels
        self.rows: list[dict[str, Any]] = []
        self.peaks: dict[str, float] = {}

    def seconds(self, step: Callable[[], object]) -> tuple[float, float]:
        """Median and spread (largest less smallest) of a call."""
        for _ in range(self.options.warm_up):
            step()
        self.wait()
        taken = []
        for _ in range(self.options.iterations):
            start = time.perf_counter()
            step()
            self.wait()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken), max(taken) - min(taken)

    def wait(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize()

    def row(self, table: str, name: str, make: Callable[[], Callable[[], object]]) -> None:
        """Measure, print and keep one row; what fails is a row, too."""
        try:
            step = make()
            with FlopCounterMode(display=False) as counter:
                step()
            if self.on_cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            median, spread = self.seconds(step)
        except Exception as error:  # a benchmark shows what fails and goes on
            print(f"| {name} | failed: {type(error).__name__}: {str(error)[:120]} |", flush=True)
            self.rows.append({"table": table, "name": name, "failed": str(error)[:500]})
            return
        flops = counter.get_total_flops()
        row = {
            "table": table,
            "name": name,
            "ms": 1e3 * median,
            "spread_ms": 1e3 * spread,
            "images_per_second": self.options.batch / median,
            "tflop": flops / 1e12,
            "tflops": flops / 1e12 / median,
            "gib": torch.cuda.max_memory_allocated() / 2**30 if self.on_cuda else None,
        }
        self.rows.append(row)
        memory = f" {row['gib']:.1f} |" if self.on_cuda else ""
        print(
            f"| {name} | {row['ms']:.1f} | {row['spread_ms']:.1f} | "
            f"{row['images_per_second']:.1f} | {row['tflops']:.2f} | {self.share(row)} |{memory}",
            flush=True,
        )
        del step
        if self.on_cuda:
            torch.cuda.empty_cache()

    def share(self, row: dict[str, Any]) -> str:
        kind = "float32" if "float32" in row["name"] else "half"
        peak = self.peaks.get(kind) or self.peaks["float32"]
        row["share_of_peak"] = row["tflops"] / peak
        return f"{100 * row['share_of_peak']:.0f} %"

    def measure_peaks(self) -> None:
        """One large matrix product in each precision, in TFLOP/s."""
        size = 8192 if self.on_cuda else 2048
        for name, dtype in (("float32", torch.float32), ("half", torch.bfloat16)):
            a = torch.randn(size, size, device=self.device).to(dtype)
            median, _ = self.seconds(lambda a=a: a @ a)  # type: ignore[misc]
            self.peaks[name] = 2 * size**3 / median / 1e12
        print(
            f"Peak: {self.peaks['float32']:.2f} TFLOP/s in float32"
            f"{' (TF32)' if self.on_cuda else ''}, {self.peaks['half']:.2f} in bfloat16.\n"
        )

    def table(self, first: str) -> None:
        memory = " GiB |" if self.on_cuda else ""
        print(f"\n| {first} | ms | spread | images/s | TFLOP/s | of peak |{memory}")
        print("|---|---|---|---|---|---|" + ("---|" if self.on_cuda else ""))

    # The plain loop -----------------------------------------------------------------------------

    def plain(self, kind: str, dtype: torch.dtype | None) -> Callable[[], object]:
        """A step of `ce` (student alone) or `tse` (KD and TSE)."""
        device = self.device
        student = build_network(self.options.student, num_classes=CLASSES).to(device).train()
        teacher = None
        if kind != "ce":
            teacher = build_network(self.options.teacher, num_classes=CLASSES).to(device).eval()
        optimizer = torch.optim.SGD(student.parameters(), 0.02, momentum=0.9, weight_decay=5e-4)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        mean = torch.tensor((123.7, 116.3, 103.5), device=device).view(1, 3, 1, 1)

        def step() -> None:
            images = self.images.to(device).float() - mean
            labels = self.labels.to(device).long()
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                with torch.no_grad():
                    theirs = None if teacher is None else teacher(images)
                ours = student(images)
                if theirs is None:
                    loss = plain_cross_entropy(ours, labels)
                else:
                    loss = plain_tse(ours, theirs, labels) + plain_kd(ours, theirs)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            loss.item()

        return step

    # Ours ---------------------------------------------------------------------------------------

    def ours(self, method: str, iteration: int, precision: str) -> Callable[[], object]:
        """The trainer's own step."""
        teacher = None
        if METHODS[method].needs_teacher:
            params = NetworkParams(name=self.options.teacher, pretrained=False)
            network = build_network(self.options.teacher, num_classes=CLASSES)
            teacher = NetworkCheckpoint.from_network(
                network, params=params, label_names=LABELS.names
            )
        job = TrainingJob(
            method=method,
            network=NetworkParams(name=self.options.student, pretrained=False),
            recipe=RecipeParams(
                iterations=ITERATIONS,
                batch_size=self.options.batch,
                augment={"crop": tuple(self.options.size)},
            ),
            rdd=RddParams(tfe_length=100),
            precision=precision,
        )
        training = Training(job, Images(Path(), (), LABELS), teacher)
        options = TrainerParams(
            device=self.options.device,
            threads=self.options.threads,
            compile=self.options.compile,
        )
        trainer = Trainer(_Unchecked(training), options, self.device, None, None)
        components = build(training, options, self.device, trainer.micro_batches)
        components.wrapped.train()
        batch = Batch(iteration, self.images, self.labels)

        def step() -> None:
            trainer._one_step(components, on_device(batch, trainer), 1e-4)
            while len(trainer._readings) > int(self.on_cuda):  # as the training reads them
                trainer._check(trainer._readings.popleft())

        return step

    # Parts --------------------------------------------------------------------------------------

    def parts(self, precision: str) -> None:
        dtype = None if precision == "float32" else torch.bfloat16
        device, options = self.device, self.options
        images = self.images.to(device).float().contiguous(memory_format=torch.channels_last)
        labels = self.labels.to(device)

        def autocast() -> torch.autocast:
            return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)

        def network(name: str, *, frozen: bool) -> Any:
            made = build_network(name, num_classes=CLASSES)
            made = freeze(made, dtype) if frozen else made
            return made.to(device, memory_format=torch.channels_last)

        def asked_teacher(*, frozen: bool) -> Callable[[], object]:
            teacher = network(options.teacher, frozen=frozen).eval()

            def forward() -> None:
                with torch.no_grad(), autocast():
                    teacher(images)

            return forward

        def student_both() -> Callable[[], object]:
            student = network(options.student, frozen=False).train()

            def both() -> None:
                with autocast():
                    output = student(images)
                sum(map(torch.sum, _logits(output))).backward()
                student.zero_grad()

            return both

        self.row("parts", f"teacher as trained, {precision}", lambda: asked_teacher(frozen=False))
        self.row("parts", f"teacher frozen (ours), {precision}", lambda: asked_teacher(frozen=True))
        self.row("parts", f"student forward and backward, {precision}", student_both)
        if precision == "float32":
            return
        height, width = options.size
        shape = (options.batch, CLASSES, -(-height // 8), -(-width // 8))
        student, student_aux, teacher, teacher_aux = (
            3 * torch.randn(shape, device=device) for _ in range(4)
        )
        for tensor in (student, student_aux):
            tensor.requires_grad_()
        both = {"student_aux_logits": student_aux}
        theirs = {"teacher_logits": teacher, "teacher_aux_logits": teacher_aux}
        pair, other = Heads(student, student_aux), Heads(teacher, teacher_aux)
        losses: dict[str, Callable[[], Tensor]] = {
            "loss: plain cross-entropy": lambda: plain_cross_entropy(pair, labels.long()),
            "loss: ours cross-entropy": lambda: cross_entropy_loss(student, labels, **both).loss,
            "loss: ours TFE": lambda: tfe_loss(student, labels, **theirs, **both).loss,
            "loss: plain TSE": lambda: plain_tse(pair, other, labels.long()),
            "loss: ours TSE": lambda: tse_loss(student, labels, **theirs, **both).loss,
        }
        for name, loss in losses.items():

            def with_gradient(loss: Callable[[], Tensor] = loss) -> None:
                student.grad = student_aux.grad = None
                loss().backward()

            self.row("parts", name, lambda call=with_gradient: call)  # type: ignore[misc]


class _Unchecked:
    """A training that does not say it has no images."""

    def __init__(self, training: Training) -> None:
        self._training = training

    def __getattr__(self, name: str) -> Any:
        return (lambda world_size: None) if name == "check" else getattr(self._training, name)


class Heads:
    """Logits of both heads, as networks return them."""

    def __init__(self, logits: Tensor, aux_logits: Tensor) -> None:
        self.logits, self.aux_logits = logits, aux_logits


def _logits(output: NetworkOutput | Heads) -> Iterator[Tensor]:
    yield output.logits
    if output.aux_logits is not None:
        yield output.aux_logits


def plain_cross_entropy(student: Any, labels: Tensor) -> Tensor:
    loss = torch.zeros((), device=labels.device)
    for weight, logits in zip((1.0, 0.4), _logits(student), strict=False):
        logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=True)
        loss = loss + weight * F.cross_entropy(logits, labels, ignore_index=255)
    return loss


def plain_tse(student: Any, teacher: Any, labels: Tensor) -> Tensor:
    loss, valid = torch.zeros((), device=labels.device), labels != 255
    index = labels.masked_fill(~valid, 0)[:, None]
    heads = zip((1.0, 0.4), _logits(student), _logits(teacher), strict=False)
    for weight, *pair in heads:
        ours, theirs = (
            F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=True)
            for logits in pair
        )
        hard = []
        for logits in (ours.detach(), theirs):
            p = logits.float().softmax(1).gather(1, index)[:, 0].masked_fill(~valid, 1).flatten()
            kth = p[p.argsort()[min(100_000, len(p)) - 1]].clamp(min=0.7)
            hard.append(valid & (p <= kth).view_as(valid))
        target = labels.masked_fill(~(hard[0] ^ hard[1]), 255)
        loss = loss + weight * F.cross_entropy(ours, target, ignore_index=255)
    return loss


def plain_kd(student: Any, teacher: Any) -> Tensor:
    ours, theirs = student.logits.float().log_softmax(1), teacher.logits.float().softmax(1)
    return F.kl_div(ours, theirs, reduction="none").sum(1).mean()


def machine(device: torch.device) -> dict[str, str | int]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def main(words: list[str] | None = None) -> int:
    """Measure, print, write."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--warm-up", type=int)
    parser.add_argument("--threads", type=int, default=None if cuda else 2)
    parser.add_argument("--student", default="deeplabv3_resnet18")
    parser.add_argument("--teacher", default="deeplabv3_resnet101")
    parser.add_argument("--methods", nargs="*", default=[], help="`all` or names")
    parser.add_argument("--compile", action="store_true", help="trainer.compile for our rows")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    on_cuda = options.device.startswith("cuda")
    options.batch = options.batch or (16 if on_cuda else 4)
    options.size = options.size or ([512, 1024] if on_cuda else [360, 360])
    options.iterations = options.iterations or (12 if on_cuda else 3)
    options.warm_up = options.warm_up if options.warm_up is not None else (3 if on_cuda else 1)
    warnings.filterwarnings("ignore", ".*lr_scheduler.*|.*pin_memory.*")

    bench = Bench(options)
    about = machine(bench.device)
    print(" · ".join(f"{name} {value}" for name, value in about.items()))
    height, width = options.size
    print(f"{options.teacher} to {options.student}, {height} x {width}, batch {options.batch}")
    bench.measure_peaks()
    half = torch.float16 if on_cuda else torch.bfloat16
    name_of_half = str(half).removeprefix("torch.")
    bench.table("whole step")
    for kind, what in (("ce", "cross-entropy alone"), ("tse", "KD + TSE")):
        bench.row("step", f"plain {what}, {name_of_half}", lambda k=kind: bench.plain(k, half))
        bench.row("step", f"plain {what}, float32", lambda k=kind: bench.plain(k, None))
    with freed_memory_kept(bench.device.type):  # as in a training; the plain loop is as it comes
        measure_ours(bench)
    options.output.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "_" for c in str(about["device"])).strip("_").lower()
    file = options.output / f"step_{name}_{height}x{width}.json"
    sizes = {name: getattr(options, name) for name in ("batch", "size", "student", "teacher")}
    result = {"machine": about, **sizes, "peak_tflops": bench.peaks, "rows": bench.rows}
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nWritten to {file}.")
    return 1 if any("failed" in row for row in bench.rows) else 0


def measure_ours(bench: Bench) -> None:
    """Rows of the trainer, then of its parts."""
    options = bench.options
    rows = [("baseline", IN_TSE), ("kd", IN_TSE), ("tse", IN_TFE), ("tse", IN_TSE)]
    for method, iteration in rows:
        stage = {IN_TFE: " (TFE stage)", IN_TSE: " (TSE stage)"}[iteration] * (method == "tse")
        for precision in ("bfloat16", "float32"):
            bench.row(
                "step",
                f"ours {method}{stage}, {precision}",
                lambda m=method, i=iteration, p=precision: bench.ours(m, i, p),
            )
    methods = sorted(METHODS) if options.methods == ["all"] else options.methods
    for method in methods:
        if method not in dict(rows):
            bench.row("step", f"ours {method}", lambda m=method: bench.ours(m, IN_TSE, "bfloat16"))
    bench.table("part")
    for precision in ("bfloat16", "float32"):
        bench.parts(precision)
    if options.profile and bench.on_cuda:
        profile(bench)


def profile(bench: Bench) -> None:
    """Kernels of one TSE step by the time they take, and how often the host waits."""
    step = bench.ours("tse", IN_TSE, "bfloat16")
    for _ in range(3):
        step()
    bench.wait()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    print(f"\nWaits for the device in a step: {len(waits)}")
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        step()
        bench.wait()
    kernels = [e for e in trace.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.self_device_time_total for e in kernels) / 1e3
    print(f"Kernels: {sum(e.count for e in kernels)}, {busy:.1f} ms")
    for event in sorted(kernels, key=lambda e: -e.self_device_time_total)[:20]:
        taken = event.self_device_time_total / 1e3
        print(f"  {taken:8.2f} ms x{event.count:5} {event.key[:100]}")


if __name__ == "__main__":
    sys.exit(main())
