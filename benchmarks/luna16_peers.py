"""Trains the peers of r1jax on luna16_fpr_2d from scratch: ResNet-18, DenseNet-121, a small CNN (torch), and an SVM.

    python benchmarks/luna16_peers.py --data DIR --output peers.json
    python benchmarks/luna16_peers.py --data DIR --output tiny.json --models cnn3 --epochs 1 --seeds 1 --limit 256

Same arrays, augmentation (r1jax/tasks/medical/batch.py), epochs, batch and weight average as `configs/medical.py`
with luna16_fpr_2d. The learning rate and the stem of each network are the best of a grid, chosen with a seed of their
own by the AUC on the validation part itself; some settings of r1jax were chosen there too (benchmarks/README.md). No
epoch is chosen: the figures are those of the averaged weights after the last step.
"""

import argparse
import copy
import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import scipy.fft

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.children import told_command  # noqa: E402
from r1jax.data.folder import FolderCases  # noqa: E402
from r1jax.tasks import metrics  # noqa: E402

NETWORKS = ("resnet18", "densenet121", "cnn3")
ZOOM, SHIFT, GAIN, LIFT = 0.165, 0.08, 0.15, 0.15
"""Augmentation: log zoom, shift as a share of the edge, log contrast, brightness in units of -1..1."""
WARMUP, FINAL = 0.067, 0.01
"""Share of the steps with a rising learning rate, and the last learning rate as a share of the highest."""
WEIGHT_DECAY, CLIP_NORM = 0.05, 1.0
TUNING_SEED = 1000
FIGURES = ("auc", "average_precision", "sensitivity_at_specificity_0.973", "specificity_at_sensitivity_0.991")


def figures(labels: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    values = (
        metrics.roc_auc(labels, scores),
        metrics.average_precision(labels, scores),
        metrics.sensitivity_at_specificity(labels, scores, 0.973).sensitivity,
        metrics.specificity_at_sensitivity(labels, scores, 0.991).specificity,
    )
    return dict(zip(FIGURES, values, strict=True))


def load(folder: Path, split: str, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 50, 50] and labels float32 [n]."""
    source = FolderCases.open(folder, split)
    batch = source.read_batch(np.arange(min(len(source), limit or len(source))))
    return batch["image"], batch["target.nodule_present"]


# ---- support-vector machine -----------------------------------------------------------------------------------------


def svm_features(images: np.ndarray) -> np.ndarray:
    """Mean and standard deviation on 25 rings about the centre, and the 12 x 12 lowest cosine coefficients."""
    x = images.astype(np.float64) / 255
    offsets = np.indices(x.shape[1:]) - (np.array(x.shape[1:]) - 1)[:, None, None] / 2
    rings = np.minimum(np.hypot(*offsets).astype(int), 24).ravel()
    flat, count = x.reshape(len(x), -1), np.bincount(rings, minlength=25)
    one_hot = np.eye(25)[rings]
    mean = flat @ one_hot / count
    spread = np.sqrt(np.maximum(flat**2 @ one_hot / count - mean**2, 0))
    cosine = scipy.fft.dctn(x, axes=(1, 2), norm="ortho")[:, :12, :12].reshape(len(x), -1)
    return np.concatenate([mean, spread, cosine], axis=1)


def run_svm(train, val, args: argparse.Namespace) -> dict:
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    start = time.perf_counter()
    model = make_pipeline(StandardScaler(), SVC(C=10, class_weight="balanced"))
    model.fit(svm_features(train[0]), train[1])
    scores = model.decision_function(svm_features(val[0]))
    seconds = time.perf_counter() - start
    return {
        "settings": {"C": 10, "kernel": "rbf"},
        "runs": [{"seconds": seconds, "views": {"1": figures(val[1], scores)}}],
    }


# ---- networks -------------------------------------------------------------------------------------------------------


def build(name: str, stem: str, images):
    """A network with one input channel and one logit, on the device of the images, which lazy layers are sized by.

    Args:
      name: resnet18, densenet121 (torchvision's) or cnn3.
      stem: `stride4` is torchvision's (7 x 7 convolution and pooling), `stride1` a 3 x 3 convolution without pooling,
        as is usual for images this small. cnn3 has none.
    """
    import torch
    from torch import nn

    if name == "cnn3":  # after the network of swethasubramanian/LungCancerDetection
        model = nn.Sequential(
            *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.LazyLinear(512), nn.ReLU(), nn.Dropout(0.5), nn.Linear(512, 1)),
        )
    else:
        import torchvision.models

        model = getattr(torchvision.models, name)(weights=None, num_classes=1)
        first = nn.Conv2d(1, 64, 7, 2, 3, bias=False) if stem == "stride4" else nn.Conv2d(1, 64, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
        body, names = (model, ("conv1", "maxpool")) if name == "resnet18" else (model.features, ("conv0", "pool0"))
        setattr(body, names[0], first)
        if stem == "stride1":
            setattr(body, names[1], nn.Identity())
    model = model.to(images.device).eval()
    with torch.no_grad():
        model(images)
    return model.train()


def augment(x, generator):
    """Any turn, mirror, zoom, shift, contrast and brightness, with linear interpolation and repeated edges.

    Args:
      x: [B, 1, H, W] in -1..1.
      generator: Source of randomness on the device of x.
    """
    import torch

    batch, _, *size = x.shape

    def uniform(*shape):
        return torch.rand(shape, device=x.device, generator=generator)

    angle, zoom = uniform(batch) * (2 * torch.pi), torch.exp((2 * uniform(batch) - 1) * ZOOM)
    mirror = torch.where(uniform(batch, 2) < 0.5, -1.0, 1.0)  # with any turn, this covers all of D4
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2) * mirror[:, None]
    axes = [torch.arange(n, device=x.device) - (n - 1) / 2 for n in reversed(size)]  # grid_sample wants (x, y)
    offsets = torch.stack(torch.meshgrid(*axes, indexing="xy"), -1).reshape(-1, 2)
    edge = torch.tensor(size[::-1], device=x.device)
    source = offsets @ rotation.mT + ((2 * uniform(batch, 1, 2) - 1) * SHIFT) * edge
    grid = (source / ((edge - 1) / 2)).reshape(batch, *size, 2)
    x = torch.nn.functional.grid_sample(x, grid, padding_mode="border", align_corners=True)
    gain, lift = (2 * uniform(2, batch, 1, 1, 1) - 1) * torch.tensor([GAIN, LIFT], device=x.device).reshape(
        2, 1, 1, 1, 1
    )
    return x * torch.exp(gain) + lift


def predict(model, images, views: int, device: str) -> np.ndarray:
    """Probabilities, averaged over the first `views` of the eight mirrored and turned views."""
    import torch

    model.eval()
    total = torch.zeros(len(images), device=device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        for view in range(views):
            x = images.transpose(-1, -2) if view & 4 else images
            x = x.flip([axis for axis, bit in ((-1, 1), (-2, 2)) if view & bit])
            total += torch.cat([torch.sigmoid(model(part).float())[:, 0] for part in x.split(1024)])
    return (total / views).cpu().numpy()


class Step:
    """One training step; on a GPU captured once as a CUDA graph, because these networks are bound by launches."""

    def __init__(self, model, x, y, args: argparse.Namespace, device: str) -> None:
        import torch

        self.model, self.x, self.y, self.device = model, x.clone(), y.clone(), device
        self.smoothing, cuda = args.label_smoothing, device == "cuda"
        self.rate = torch.zeros((), device=device)
        decayed = [p for p in model.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if p.ndim <= 1]
        groups = [
            {"params": decayed, "lr": self.rate, "weight_decay": WEIGHT_DECAY},
            {"params": rest, "lr": self.rate, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=cuda, capturable=cuda)
        self.graph = self._capture() if cuda else None

    def _eager(self) -> None:
        import torch

        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda", cache_enabled=False):
            logits = self.model(self.x)[:, 0]
        target = self.y * (1 - self.smoothing) + self.smoothing / 2
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM, foreach=True)
        self.optimizer.step()

    def _capture(self):
        """Records the step; the steps that warm up for it have learning rate 0 and leave no trace."""
        import torch

        before = copy.deepcopy(self.model.state_dict())
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.optimizer.zero_grad(set_to_none=True)
                self._eager()
        torch.cuda.current_stream().wait_stream(stream)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            with torch.cuda.graph(graph):
                self._eager()
        except RuntimeError as error:
            print(f"note: no CUDA graph, launching each kernel instead ({error})", flush=True)
            graph = None
        self.model.load_state_dict(before)
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        return graph

    def __call__(self, x, y, rate: float) -> None:
        self.x.copy_(x)
        self.y.copy_(y)
        self.rate.fill_(rate)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.optimizer.zero_grad(set_to_none=True)
            self._eager()


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Linear warmup, then a cosine down to FINAL of the highest rate."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return highest * (step + 1) / warmup
    cosine = (1 + np.cos(np.pi * (step - warmup) / max(1, steps - warmup))) / 2
    return highest * (FINAL + (1 - FINAL) * float(cosine))


def train_once(name: str, stem: str, rate: float, seed: int, train, val, args: argparse.Namespace) -> dict:
    """Trains one network; returns its figures for each number of views, and how fast it was."""
    import torch

    device = args.device
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True
    images, labels, val_images = train[0], train[1], val[0]
    batch = min(args.batch, len(images))
    model = build(name, stem, images[:2]).to(memory_format=torch.channels_last)
    generator = torch.Generator(device).manual_seed(seed)
    step_of = Step(model, images[:batch], labels[:batch], args, device)
    state = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    average = [tensor.clone() for tensor in state]
    per_epoch = len(images) // batch
    steps = args.epochs * per_epoch
    start = time.perf_counter()
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(images), device=device, generator=generator)
        rows = order[step % per_epoch * batch :][:batch]
        step_of(augment(images[rows], generator), labels[rows], learning_rate(step, steps, rate))
        torch._foreach_lerp_(average, state, 1 - min(args.ema, (1 + step) / (10 + step)))
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    for tensor, averaged in zip(state, average, strict=True):
        tensor.copy_(averaged)
    views = {str(n): figures(val[1], predict(model, val_images, n, device)) for n in args.views}
    speed = {"seconds": seconds, "images_per_second": steps * batch / seconds, "cuda_graph": step_of.graph is not None}
    return {"seed": seed} | speed | {"views": views}


def run_network(name: str, train, val, args: argparse.Namespace, save) -> dict:
    """Chooses learning rate and stem by a grid, then trains every seed; `save` gets the result after each."""
    stems = ["none"] if name == "cnn3" else args.stems
    grid = [{"stem": stem, "learning_rate": rate} for stem in stems for rate in args.learning_rates]
    tried = []
    for choice in grid if len(grid) > 1 else []:
        run = train_once(name, choice["stem"], choice["learning_rate"], TUNING_SEED, train, val, args)
        tried.append(choice | run)
        print(f"  {name} {choice}: AUC {_headline(run, args)['auc']:.4f}, {run['seconds']:.1f} s", flush=True)
    best = max(range(len(tried)), key=lambda i: _headline(tried[i], args)["auc"]) if tried else 0
    stem, rate = grid[best]["stem"], grid[best]["learning_rate"]
    parameters = sum(p.numel() for p in build(name, stem, train[0][:2]).parameters())
    result = {"settings": grid[best] | {"parameters": parameters}, "grid": tried, "runs": []}
    for seed in range(args.seeds):
        result["runs"].append(train_once(name, stem, rate, seed, train, val, args))
        print(f"  {name} seed {seed}: AUC {_headline(result['runs'][-1], args)['auc']:.4f}", flush=True)
        save(result)
    return result


def _headline(run: dict, args: argparse.Namespace) -> dict[str, float]:
    return run["views"][str(max(args.views))]


# ---- report ---------------------------------------------------------------------------------------------------------


def summarise(result: dict) -> dict:
    """Mean and sample standard deviation over the seeds, of each figure and number of views."""
    summary = {}
    for views in result["runs"][0]["views"]:
        values = {name: np.array([run["views"][views][name] for run in result["runs"]]) for name in FIGURES}
        spread = {name: float(v.std(ddof=1)) if len(v) > 1 else None for name, v in values.items()}
        summary[views] = {name: {"mean": float(values[name].mean()), "sd": spread[name]} for name in FIGURES}
    return summary


def table(models: dict) -> str:
    head = "| model | views | AUC | AP | sens at spec .973 | spec at sens .991 |\n|---|---|---|---|---|---|"
    lines = [head]
    for name, result in models.items():
        for views, row in result["summary"].items():
            cells = [
                f"{row[figure]['mean']:.4f}" + (f" ± {row[figure]['sd']:.4f}" if row[figure]["sd"] is not None else "")
                for figure in FIGURES
            ]
            lines.append(f"| {name} | {views} | {' | '.join(cells)} |")
    return "\n".join(lines)


def environment(args: argparse.Namespace) -> dict:
    """Versions, hardware and command, without the paths of this machine."""
    import importlib.metadata

    versions = {"python": platform.python_version()}
    for package in ("numpy", "scipy", "scikit-learn", "torch", "torchvision"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}"
    if args.device == "cuda":
        import torch

        hardware, versions["cuda"] = f"{torch.cuda.get_device_name()}, {hardware}", torch.version.cuda

    def bare(word):
        return Path(word).name if isinstance(word, str | Path) and "/" in str(word) else word

    return {
        "command": told_command(),
        "hardware": hardware,
        "versions": versions,
        "arguments": {k: str(bare(v)) if isinstance(v, Path) else bare(v) for k, v in vars(args).items()},
    }


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder luna16_fpr_2d")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--models", nargs="+", choices=(*NETWORKS, "svm"), default=["resnet18", "densenet121"])
    parser.add_argument("--epochs", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--views", type=int, nargs="+", default=[1, 8], help="test-time views to average, 1 to 8")
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 3e-3])
    parser.add_argument("--stems", nargs="+", choices=("stride4", "stride1"), default=["stride4", "stride1"])
    parser.add_argument("--label-smoothing", type=float, default=0.02)
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the weight average")
    parser.add_argument("--limit", type=int, help="only the first cases of each part")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    args = parse(arguments)
    train, val = load(args.data, "train", args.limit), load(args.data, "val", args.limit)
    counts = {"train": [len(train[1]), int(train[1].sum())], "val": [len(val[1]), int(val[1].sum())]}
    models = {}

    def save(result: dict) -> None:
        models[name] = result | {"summary": summarise(result)}
        report = {"data": {"cases_and_nodules": counts}, "models": models} | environment(args)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")

    if set(args.models) & set(NETWORKS):
        import torch

        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        on_device = [torch.from_numpy(part[0]).to(args.device).float()[:, None] / 127.5 - 1 for part in (train, val)]
        train_tensors = (on_device[0], torch.from_numpy(train[1]).to(args.device))
    for name in args.models:
        print(name, flush=True)
        if name == "svm":
            save(run_svm(train, val, args))
        else:
            run_network(name, train_tensors, (on_device[1], val[1]), args, save)
    print(table(models))


if __name__ == "__main__":
    main(sys.argv[1:])
