"""Bad steps change nothing: against runs in which the step did not happen, through Lightning."""

import importlib
import pkgutil
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp
from tiny_runs import Random, Tiny, everything, train
from torch.utils._python_dispatch import TorchDispatchMode

import ssl_kit.methods
from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders import Encoder
from ssl_kit.methods.method import Method
from ssl_kit.training.checkpoint import Checkpoints, SafeCheckpointIO, newest
from ssl_kit.training.curves import Curves, read_curves
from ssl_kit.training.distributed import leave
from ssl_kit.training.guard import Watchdog
from ssl_kit.training.optim import Average, Optim

METHODS = ssl_kit.methods.__path__
OPTIMS = {
    "sgd": Optim(name="sgd", lr=0.1, lr_per=None, warmup_epochs=0),
    "adamw": Optim(name="adamw", lr=0.01, lr_per=None, warmup_epochs=0, weight_decay=0.1),
    "lars": Optim(name="lars", lr=0.1, lr_per=None, warmup_epochs=0),
}


class Steps(Average):
    """Left out where the step is, as in a run without it."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.spoil.get(pl_module.step, ("", 0))[0] != "nothing":
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def spoilt(optim, spoil):
    """All state after eight batches of which some are spoilt, the averaged encoder, and the watchdog."""
    module, watchdog = Tiny(optim, spoil), Watchdog(clip=optim.clip)
    average = Steps(0.9, watchdog, lambda: 8)
    train(module, [watchdog, average], accumulate=optim.accumulate)
    state = everything(module)
    state |= {f"average/{name}": value for name, value in average.encoder(module).state_dict().items()}
    return state, watchdog


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.filterwarnings("ignore:.*returned.*None.*")
@pytest.mark.parametrize("name", OPTIMS)
@pytest.mark.parametrize("where", ["views", "loss", "gradient"])
@pytest.mark.parametrize(("step", "value"), [(0, float("nan")), (3, float("inf")), (7, float("nan"))])
def test_a_bad_step_is_a_step_that_did_not_happen(name, where, step, value):
    found, watchdog = spoilt(OPTIMS[name], {step: (where, value)})
    wanted, _ = spoilt(OPTIMS[name], {step: ("nothing", 0)})
    if step == 0 and name != "lars":  # there the optimiser has made its zeros for weights without gradient
        wanted = {key: value for key, value in wanted.items() if key in found}
    assert_same(found, wanted)
    assert watchdog.look(8)["held_steps"] == 1


@pytest.mark.parametrize("name", OPTIMS)
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_bad_activation_is_found_in_its_step(name, value, tmp_path):
    module, watchdog = Tiny(OPTIMS[name]), Watchdog()
    average = Average(0.9, watchdog, lambda: 8)

    def spoil(layer, inputs, output):
        return output * value if module.step == 3 and torch.is_grad_enabled() else None

    module.encoder[0].register_forward_hook(spoil)
    train(module, [watchdog, average])
    wanted, _ = spoilt(OPTIMS[name], {3: ("loss", float("nan"))})
    found = everything(module) | {
        f"average/{key}": value for key, value in average.encoder(module).state_dict().items()
    }
    assert_same(found, wanted)
    assert watchdog.look(8)["held_steps"] == 1


class Inject(pl.Callback):
    """Puts NaN into the trained or the averaged weights after a step; stands between the watchdog and the average."""

    def __init__(self, average, where, step=3):
        self.average, self.where, self.step, self.weights = average, where, step, []

    def on_train_batch_end(self, trainer, pl_module, *rest):
        averaged = self.average.encoder(pl_module)
        if trainer.global_step == self.step:
            self.before = [weight.clone() for weight in averaged.parameters()]
            spoilt = averaged if self.where == "average" else pl_module.encoder
            with torch.no_grad():
                spoilt[0].weight[0, 0, 0, 0] = float("nan")
        self.weights.append([weight.clone() for weight in pl_module.parameters()])


@pytest.mark.parametrize("where", ["weights", "average"])
def test_bad_weights_do_not_reach_the_average_and_end_the_run(where, tmp_path):
    watchdog = Watchdog(checkpoints=tmp_path)
    average = Average(0.9, watchdog, lambda: 8)
    inject = Inject(average, where)
    checkpoints = Checkpoints(tmp_path, minutes=0, healthy=watchdog.healthy)
    curves = Curves(tmp_path / "metrics.csv", interval=8, watchdog=watchdog)
    with pytest.raises(UserError, match=r"3 steps in a row \(first at step 3\).*step-00000002"):
        train(Tiny(OPTIMS["sgd"]), [watchdog, inject, average, curves, checkpoints], plugins=[SafeCheckpointIO()])
    assert newest(tmp_path).name == "step-00000002"  # nothing was saved from then on, though later steps had no NaN
    if where == "weights":
        assert all(map(torch.equal, inject.before, average.encoder(None).parameters()))
    for one, other in zip(inject.weights[2], inject.weights[-1], strict=True):
        assert torch.equal(one, other) or where == "weights"


def test_good_steps_are_as_without_it():
    module = Tiny(OPTIMS["sgd"])
    train(module, [])
    watched, watchdog = spoilt(OPTIMS["sgd"], {})
    for name, value in everything(module).items():
        assert torch.equal(value, watched[name]), name
    assert watchdog.look(8)["held_steps"] == 0 and watchdog.look(8).get("gradient_norm") is None


def test_one_bad_batch_holds_back_the_whole_accumulated_step():
    optim = Optim(name="sgd", lr=0.1, lr_per=None, warmup_epochs=0, accumulate=2)
    found, _ = spoilt(optim, {4: ("views", float("nan"))})
    wanted, _ = spoilt(optim, {4: ("nothing", 0), 5: ("nothing", 0)})
    assert_same(found, wanted)


def test_gradients_are_clipped_to_their_total_norm():
    seen = []

    class Norms(Watchdog):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            seen.append(torch.nn.utils.get_total_norm([p.grad for p in pl_module.parameters()]).item())

    watchdog = Norms(clip=0.05)
    train(Tiny(OPTIMS["sgd"]), [watchdog])
    assert max(seen) == pytest.approx(0.05, rel=1e-4)
    assert watchdog.look(8)["gradient_norm"] > 0.05  # it tells them as they were


def test_three_in_a_row_end_the_run_and_harm_nothing(tmp_path):
    spoil = {step: ("loss", float("nan")) for step in (2, 3, 4)}
    module, watchdog = Tiny(OPTIMS["sgd"], spoil), Watchdog(checkpoints=tmp_path / "checkpoints")
    curves = Curves(tmp_path / "metrics.csv", interval=8, watchdog=watchdog)
    with pytest.raises(UserError, match=r"3 steps in a row \(first at step 2\).*no checkpoint was written yet"):
        train(module, [watchdog, curves])
    wanted, _ = spoilt(OPTIMS["sgd"], {step: ("nothing", 0) for step in range(2, 8)})
    for name, value in everything(module).items():
        assert torch.equal(value, wanted[name]), name  # the good steps after them were held back too


def test_the_last_good_checkpoint_is_named(tmp_path):
    (tmp_path / "step-00000001").mkdir()
    SafeCheckpointIO().save_checkpoint({"global_step": 1}, tmp_path / "step-00000001")
    watchdog = Watchdog(checkpoints=tmp_path)
    train(Tiny(OPTIMS["sgd"], {step: ("loss", float("nan")) for step in (5, 6, 7)}), [watchdog])
    with pytest.raises(UserError, match=r"the last good checkpoint, .*step-00000001"):
        watchdog.look(8)
    assert not watchdog.healthy()


def test_two_in_a_row_are_named_and_the_run_goes_on(tmp_path, capsys):
    spoil = {2: ("gradient", float("nan")), 3: ("loss", float("inf")), 5: ("views", float("nan"))}
    watchdog = Watchdog()
    curves = Curves(tmp_path / "metrics.csv", interval=4, watchdog=watchdog)
    train(Tiny(OPTIMS["sgd"], spoil), [watchdog, curves])
    told = capsys.readouterr().err
    assert "2 of the steps before step 4" in told and "first: step 2; 2 in the whole run" in told
    assert "1 of the steps before step 8" in told and "first: step 5; 3 in the whole run" in told
    rows = read_curves(tmp_path / "metrics.csv")
    assert [row["held_steps"] for row in rows] == [2, 3]
    assert all(0 < row["loss"] < 10 and row["gradient_norm"] > 0 for row in rows)  # means over the good steps


def test_counts_survive_a_restart():
    watchdog, resumed = Watchdog(), Watchdog()
    train(Tiny(OPTIMS["sgd"], {6: ("loss", float("nan")), 7: ("loss", float("nan"))}), [watchdog])
    resumed.load_state_dict(watchdog.state_dict())
    train(Tiny(OPTIMS["sgd"], {0: ("loss", float("nan"))}), [resumed])
    with pytest.raises(UserError, match="3 steps in a row"):
        resumed.look(16)


def test_an_optimiser_that_cannot_skip_gets_no_bad_numbers():
    optim = Optim(name="sgd", lr=0.1, lr_per=None, warmup_epochs=0, fused=False)
    state, watchdog = spoilt(optim, {3: ("gradient", float("nan"))})
    assert all(value.isfinite().all() for value in state.values()) and watchdog.look(8)["held_steps"] == 1


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::unique")
        self.count += function._schema.name.startswith(waits)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """Counts calls that read a tensor on the host; those that a CPU tensor answers without an operator too."""
    count = {"host": 0}
    for name in ("cpu", "numpy", "tolist", "item", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, original=original, **kwargs):
            count["host"] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return count


@pytest.mark.parametrize("name", OPTIMS)
def test_nothing_waits_for_the_device_between_looks(name, waits, tmp_path):
    seen = []

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((waits["host"], reads.count))

    watchdog = Watchdog(clip=1.0)
    average = Average(0.9, watchdog, lambda: 8)
    curves = Curves(tmp_path / "metrics.csv", interval=8, watchdog=watchdog)
    with Reads() as reads:
        train(Tiny(OPTIMS[name]), [Count(), watchdog, average, curves])
    assert seen[7] == seen[1], seen  # in the first step the optimiser makes its state
    assert waits["host"] > seen[7][0] and reads.count > seen[7][1]  # the look at the end is counted


def methods():
    """Every method of the package."""
    modules = [importlib.import_module(f"ssl_kit.methods.{found.name}") for found in pkgutil.iter_modules(METHODS)]
    kinds = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    return sorted(
        (kind for kind in kinds if issubclass(kind, Method) and kind is not Method), key=lambda kind: kind.__name__
    )


@pytest.mark.parametrize("kind", methods())
def test_no_method_waits_for_the_device_in_a_step(kind, waits):
    name, args = kind.default_encoder((16, 16))
    small = {"channels": [8, 8, 16, 16]} if name.startswith("resnet") else {}
    method = kind(encoder=Encoder(name, args | small, (16, 16)))
    seen = []

    class Count(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append((waits["host"], reads.count))

    class Views(Random):
        def _batch(self, number):
            views = [torch.rand(8, 3, 16, 16).mul(255).round() / 255 for _ in range(method.num_views)]
            return {"views": views, "key": Key(0, 0, torch.arange(8)), "label": torch.zeros(8, dtype=torch.int64)}

    with Reads() as reads:
        train(method, [Count(), Watchdog()], 4, data=Views(4))
    assert seen[3] == seen[1], seen  # a method may look at its first batch


def _one_rank(rank, world, port, queue):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    watchdog, module = Watchdog(), Tiny(OPTIMS["sgd"])
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
    trainer = SimpleNamespace(precision_plugin=None, accumulate_grad_batches=1, global_step=0)
    before = module.head.weight.detach().clone()
    watchdog.on_train_start(trainer, module)
    watchdog.on_train_batch_start(trainer, module, {}, 0)
    loss = module.head(torch.ones(2, 4)).sum()
    loss.backward()
    watchdog.on_before_backward(trainer, module, loss if rank == 0 else loss * float("nan"))
    watchdog.on_before_optimizer_step(trainer, module, optimiser)
    optimiser.step()
    queue.put((rank, watchdog.look(1)["held_steps"], torch.equal(before, module.head.weight)))
    torch.distributed.barrier()
    leave()


def test_a_loss_that_is_bad_on_one_process_holds_back_all(free_port):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_one_rank, args=(2, free_port, queue), nprocs=2)
    assert sorted(queue.get() for _ in range(2)) == [(0, 1, True), (1, 1, True)]
