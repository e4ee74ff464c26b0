"""`--batch-size auto` is the largest that fits, the same everywhere, and the run it makes is the one made by hand."""

import math
import random

import pytest
import torch
import worlds
from conftest import TINY, log_of
from safetensors.torch import load_file
from torch import nn

from mlc import batch_size, train
from mlc.batch_size import _later, _taken, search
from mlc.config import Config
from mlc.models.teacher import Teacher
from mlc.parallel import compiler, memory, strategy
from shards.console import UserError
from shards.console import run as run_verb

CPU = torch.device("cpu")
GIB = 2**30


# ---- the search ------------------------------------------------------------------------------------------------------


def device(fixed: float, each: float, *, bend: float = 0.0, raises_at: float = 1.1):
    """size -> share of the memory, as a GPU behaves: not quite a line, and out of memory some way above 1."""
    asked = []

    def share(size: int) -> float:
        asked.append(size)
        taken = fixed + each * size * (1 + bend * math.sin(size))
        return math.inf if taken > raises_at else taken

    return share, asked


@pytest.mark.parametrize("steps", [(1, 2), (4,)])
@pytest.mark.parametrize("confirm", [True, False])
def test_the_search_finds_the_largest_that_fits(confirm, steps):
    """Against trying all sizes, on devices whose use is a line."""
    draw = random.Random(0)
    for _ in range(300):
        step = draw.choice(steps)
        total = step * draw.randint(1, 96)
        sizes = [size for size in range(step, total + 1, step) if total % size == 0]
        share, asked = device(draw.uniform(0, 1.05), 10 ** draw.uniform(-4, 0))
        found, shares = search(sizes, share, confirm=confirm)
        assert steps != (4,) or all(size % 4 == 0 for size in asked)
        assert found == max((size for size in sizes if share(size) <= 1), default=0)
        assert not found or shares[found] == pytest.approx(share(found))


def test_what_is_confirmed_fits_though_use_is_no_line():
    draw, ran_out, trials = random.Random(1), 0, 0
    for _ in range(300):
        share, asked = device(draw.uniform(0, 0.5), 10 ** draw.uniform(-3, -1), bend=0.03)
        found, _ = search([1, 2, 4, 8, 16, 32, 64, 128, 256], share, confirm=True)
        trials += len(asked)
        ran_out += sum(math.isinf(share(size)) for size in set(asked))
        assert found == 0 or share(found) <= 1
    assert trials < 300 * 4 and ran_out < 30  # memory hardly ever runs out on the way


@pytest.mark.parametrize(
    "sizes, asked",
    [([1], [1]), ([1, 2], [2]), ([1, 3], [2, 3]), ([2, 4, 8], [2, 4, 8]), ([4], [4]), ([4, 12, 36], [4, 8, 36])],
)
def test_no_more_is_tried_than_a_step_has(sizes, asked):
    share, tried = device(0.1, 0.01)
    assert search(sizes, share, confirm=True)[0] == sizes[-1] and tried == asked


# ---- how much memory -------------------------------------------------------------------------------------------------


def test_what_a_pass_takes_is_counted():
    """A chain of linear layers keeps the input of each layer, one gradient at a time goes back."""
    width, layers = 64, 10
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(layers)])
    weights = layers * width * width * 4

    def taken(size: int) -> float:
        return _taken(lambda n: model(torch.ones(n, width)).sum().backward(), size, model, CPU)

    each = width * 4
    kept = (1 + layers) * each  # the input, and the output of each layer
    slope = (taken(4096) - taken(1024)) / 3072
    assert kept <= slope <= kept + 2 * each
    assert weights <= taken(1) <= weights + width * width * 4 + kept + 2 * each + 64


def test_a_view_costs_nothing_and_what_is_freed_is_given_back():
    with memory.peak(CPU) as peak:
        for _ in range(3):
            x = torch.ones(1000).view(10, 100).t()
            x.add_(1)
            x = x.reshape(1000)  # a copy
            del x
    assert peak.bytes == 8000


def test_a_trial_leaves_nothing_behind():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten(), nn.LazyLinear(2))
    model(torch.ones(2, 3, 8, 8))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()

    def trial(size: int) -> None:
        model(torch.rand(size, 3, 8, 8)).sum().backward()
        assert model[1].num_batches_tracked == before["1.num_batches_tracked"] + 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 ...")

    assert _taken(trial, 2, model, CPU) == math.inf
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with pytest.raises(RuntimeError, match="another"):
        _taken(lambda size: (_ for _ in ()).throw(RuntimeError("another")), 2, model, CPU)


def test_what_training_has_beside_a_trial():
    """Under DDP AdamW's state as AdamW makes it; dividing everything among many leaves what cannot be divided."""
    model = nn.ModuleDict({"stem": nn.Linear(10, 10), "blocks": nn.Sequential(*[nn.Linear(10, 10) for _ in range(4)])})
    model["stem"].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    moments = sum(s[k].nbytes for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq"))
    assert _later(strategy.Choice(name="ddp"), model, None, 2) == moments
    weights, layer = 5 * 110 * 4, 110 * 4
    sharded = _later(strategy.Choice(name="fsdp2"), model, model, 10**9)
    assert sharded == pytest.approx(5 * layer - 2 * weights, abs=1)


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_that_of_the_container(tmp_path, version):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {32 * 2**20} kB\nMemAvailable:   {20 * 2**20} kB\n")
    assert memory.host_memory(tmp_path) == 20 * GIB
    own = ("0::/job/step\n", "") if version == 2 else ("5:devices:/\n4:memory:/job/step\n", "memory")
    (tmp_path / "proc/self/cgroup").write_text(own[0])
    step = tmp_path / "sys/fs/cgroup" / own[1] / "job/step"
    step.mkdir(parents=True)
    limit, usage, cached = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    (step / limit).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    (step / usage).write_text(f"{5 * GIB}\n")
    job = step.parent
    for name, text in ((limit, f"{8 * GIB}"), (usage, f"{6 * GIB}"), ("memory.stat", f"anon 1\n{cached} {GIB}")):
        (job / name).write_text(text + "\n")
    assert memory.host_memory(tmp_path) == 3 * GIB


def test_processes_of_one_machine_share_it(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: 12 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert memory.room(CPU) == 2 * GIB


def test_on_a_gpu_the_allocator_is_asked(monkeypatch):
    """Also for what it holds already: 10 GiB free for others, of its own 6 GiB two are in use."""
    device, said = torch.device("cuda", 0), {"reserved": 6 * GIB, "allocated": 2 * GIB, "max": 0}
    for name, answer in (
        ("empty_cache", lambda: None),
        ("mem_get_info", lambda device: (10 * GIB, 80 * GIB)),
        ("memory_reserved", lambda device: said["reserved"]),
        ("memory_allocated", lambda device: said["allocated"]),
        ("max_memory_allocated", lambda device: said["max"]),
        ("reset_peak_memory_stats", lambda device: said.update(max=said["allocated"])),
    ):
        monkeypatch.setattr(torch.cuda, name, answer)
    assert memory.room(device) == int(0.9 * 16 * GIB) - 2 * GIB
    with memory.peak(device) as peak:
        said["max"] = 5 * GIB
    assert peak.bytes == 3 * GIB and said["max"] == 2 * GIB


# ---- runs ------------------------------------------------------------------------------------------------------------


def argv(shards, folder, *more: str, model: list[str] = TINY) -> list[str]:
    short = ["--data", str(shards), "--output", str(folder), "--experiment", "run", "-j", "0", "--lr", "1e-3"]
    return [*model, *short, "--max-steps", "3", "--log-interval", "1", "--global-batch-size", "16", *more]


def log_without_times(folder) -> list[dict]:
    timed = ("train/img_per_sec", "data/wait_frac", "sys/mem_gb", "ckpt/blocked_s", "ckpt/write_s")
    return [{k: v for k, v in line.items() if k not in timed} for line in log_of(folder / "run")]


def equal_runs(a, b) -> None:
    assert log_without_times(a) == log_without_times(b)
    mine, theirs = (load_file(folder / "run" / "last" / "model.safetensors") for folder in (a, b))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def memory_for(images: int, monkeypatch) -> None:
    """Trials are made, but what they take is said to be this much."""

    def limited(sizes, share, *, confirm):
        return search(sizes, lambda size: size / images if share(size) < math.inf else math.inf, confirm=confirm)

    monkeypatch.setattr(batch_size, "search", limited)


COMPILE = torch.compile
SHALLOW = [word.replace("depths=[2,2]", "depths=[1,1]") for word in TINY]
MODELS = {"swin": TINY, "batch norm": ["--model", "test_resnet", "--img-size", "32"]}


@pytest.mark.parametrize("model, more", [("swin", ["--mixup", "0.4", "--reprob", "0.3"]), ("batch norm", [])])
def test_the_run_is_the_one_made_by_hand(shards, tmp_path, capsys, monkeypatch, model, more):
    """Dropout, running statistics, mixing, the size of evaluation batches: all as if there had been no trial."""
    args = [*more, "--drop", "0.1"]
    assert train.main(argv(shards, tmp_path / "hand", *args, "-b", "4", model=MODELS[model])) == 0
    assert "batch size auto" not in capsys.readouterr().err
    memory_for(5, monkeypatch)
    auto = argv(shards, tmp_path / "auto", *args, "-b", "auto", model=MODELS[model])
    assert train.main(auto) == 0
    said = capsys.readouterr().err
    assert "batch size auto: 4 per device (8 would take 160%), accumulation 4; 4 take 80% of" in said
    assert "4 a device x 4 accumulated" in said
    equal_runs(tmp_path / "auto", tmp_path / "hand")
    settings = [(tmp_path / name / "run" / "args.yaml").read_text() for name in ("auto", "hand")]
    assert settings[0].replace("auto", "hand") == settings[1].replace("auto", "hand")

    memory_for(10**6, monkeypatch)  # dropout depends on the micro-batch: a run that goes on keeps its own
    assert train.main([*auto, "--resume", "auto", "--max-steps", "4"]) == 0
    assert "4 per device (as before; 16 would fit), accumulation 4" in capsys.readouterr().err


def test_a_teacher_and_recomputed_blocks_are_part_of_the_trial(shards, tmp_path, capsys, monkeypatch):
    assert train.main(argv(shards, tmp_path / "teacher", "-b", "8", "--max-steps", "1")) == 0
    more = ["--kd-teacher", str(tmp_path / "teacher" / "run"), "--grad-checkpointing", "all", "--dry-run", "-b", "auto"]
    sizes, passed = [], Teacher.__call__

    def called(self, image):
        sizes.append(len(image))
        return passed(self, image)

    monkeypatch.setattr(Teacher, "__call__", called)
    assert train.main(argv(shards, tmp_path, *more)) == 0
    said = capsys.readouterr().err
    assert "batch size auto: 16 per device (all of its share), accumulation 1" in said
    assert "pixels uint8 [16, 3, 32, 32]" in said and sizes == [2, 4, 16, 16]


def test_a_compiled_model_is_compiled_anew_for_the_run(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compiler, "need_compiler", lambda device: None)
    graphs = {"hand": [], "auto": []}
    for name, size in (("hand", "4"), ("auto", "auto")):

        def backend(graph, inputs, seen=graphs[name]):
            seen.append({len(tensor) for tensor in inputs if tensor.dim() == 4})
            return graph

        monkeypatch.setattr(compiler.torch, "compile", lambda f, mode, b=backend, **more: COMPILE(f, backend=b, **more))
        if name == "auto":
            memory_for(5, monkeypatch)
        more = ["--compile", "-b", size, "--val-split", "", "--max-steps", "2"]
        assert train.main(argv(shards, tmp_path / name, *more, model=SHALLOW)) == 0
    assert "batch size auto: 4 per device" in capsys.readouterr().err
    assert graphs["auto"][-len(graphs["hand"]) :] == graphs["hand"] and 4 in graphs["hand"][0]
    equal_runs(tmp_path / "auto", tmp_path / "hand")


@pytest.mark.parametrize(
    "more, words",
    [
        (["--global-batch-size", "none"], "--batch-size auto needs --global-batch-size"),
        (["--global-batch-size", "15", "--mixup", "0.4"], "is not a multiple of 1 process x 2 (mixing pairs"),
    ],
)
def test_mistakes_are_one_line(shards, tmp_path, capsys, more, words):
    assert run_verb(train.main, argv(shards, tmp_path, "-b", "auto", *more)) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and words in message


@pytest.mark.parametrize(
    ("size", "total", "words"),
    [
        ("1", "2", "1 image per device and pass is too few for batch norm (layer"),
        ("auto", "1", "1 image per device and pass is too few for batch norm (layer"),
        ("auto", "3", "--batch-size auto: 3 per device is too much"),
    ],
)
def test_one_image_is_too_few_for_batch_norm(shards, tmp_path, capsys, monkeypatch, size, total, words):
    """At 32 px the last maps of this model have one pixel. The memory holds two images."""
    memory_for(2, monkeypatch)
    more = ["-b", size, "--global-batch-size", total]
    assert run_verb(train.main, argv(shards, tmp_path, *more, model=MODELS["batch norm"])) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_deepspeeds_buffers_are_not_guessed():
    with pytest.raises(UserError, match="--batch-size auto does not go with zero2"):
        batch_size.plan(Config(batch_size="auto", global_batch_size=16), strategy.Choice(name="zero2"), 2)


def test_where_nothing_fits(shards, tmp_path, capsys, monkeypatch):
    memory_for(0.5, monkeypatch)
    assert run_verb(train.main, argv(shards, tmp_path, "-b", "auto")) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: --batch-size auto: 1 per device is too much for" in message and "--grad-checkpointing" in message


# ---- out of memory ---------------------------------------------------------------------------------------------------

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15.60 GiB")
HOST = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1000000 bytes.")


@pytest.mark.parametrize("error, more", [(CUDA, " for another 2.50 GiB"), (HOST, " for another 1000000 bytes")])
@pytest.mark.parametrize(
    "where, advice",
    [
        ("prepare", "with --batch-size 8: --batch-size 4 --global-batch-size 16 is the same run in less memory"),
        ("evaluate", "in the evaluation with 8 images at a time: --validation-batch-size 4"),
    ],
)
def test_no_memory_is_one_line_that_says_what_to_set(shards, tmp_path, capsys, monkeypatch, error, more, where, advice):
    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(train, where, fails)
    assert run_verb(train.main, argv(shards, tmp_path, "-b", "8")) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"error: out of memory{more}; {advice}") and "--resume auto goes on" in message


def test_the_advice_fits_the_run():
    def advice(**settings) -> str:
        with pytest.raises(UserError) as error, batch_size.in_training(Config(**settings)):
            raise MemoryError
        return str(error.value)

    assert "--batch-size 2 --global-batch-size 18 " in advice(batch_size=6, global_batch_size=18, mixup=0.4)
    assert "--batch-size 16 --global-batch-size 32 " in advice(batch_size=32)
    assert "with --batch-size 1; --grad-checkpointing all, a smaller --img-size" in advice(batch_size=1)
    assert "the model itself does not fit" in advice(batch_size="auto", global_batch_size=8)
    worker = "Caught RuntimeError in DataLoader worker process 0.\nDefaultCPUAllocator: can't allocate memory"
    with pytest.raises(RuntimeError, match="DataLoader worker"), batch_size.in_training(Config()):
        raise RuntimeError(worker)


# ---- two processes ---------------------------------------------------------------------------------------------------


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_process_with_the_least_memory_decides(shards, tmp_path, strategy):
    """The last one has no memory for more than 2 images: while it learns that, and after, nobody waits for anybody."""
    args = argv(shards, tmp_path / "auto", "-b", "auto", "--strategy", strategy)
    said = worlds.train(2, args, "little_memory")
    assert "batch size auto: 2 per device (4 ran out of memory), accumulation 4" in said
    worlds.train(2, argv(shards, tmp_path / "hand", "-b", "2", "--strategy", strategy))
    equal_runs(tmp_path / "auto", tmp_path / "hand")


@pytest.mark.distributed
def test_a_process_without_memory_ends_all(shards, tmp_path):
    codes, said = worlds.ask(2, argv(shards, tmp_path, "-b", "4"), "little_memory")
    assert codes == [1, 2] or codes == [-15, 2], said
    assert "[rank 1] error: out of memory for another 2.50 GiB; with --batch-size 4: --batch-size 2" in said
    assert "Traceback" not in said and "[rank 0] stopped: another process failed, its error is the one to read" in said
