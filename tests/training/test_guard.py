"""Bad steps change nothing: against runs in which the step did not happen, through Lightning. What diagnose writes."""

import csv
from dataclasses import replace

import pytest
import pytorch_lightning as pl
import torch
import torch.multiprocessing as mp
from every_method import methods
from tiny_runs import Random, Tiny, everything, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_kit.core.errors import UserError
from ssl_kit.core.random import Key
from ssl_kit.encoders import Encoder
from ssl_kit.training.checkpoint import Checkpoints, SafeCheckpointIO, newest
from ssl_kit.training.curves import Curves, read_curves
from ssl_kit.training.distributed import leave
from ssl_kit.training.guard import Diagnose, Guard
from ssl_kit.training.loop import Loop
from ssl_kit.training.optim import EMA, Optim

OPTIMS = {
    "sgd": Optim(name="sgd", lr=0.1, lr_per=None, warmup_epochs=0),
    "adamw": Optim(name="adamw", lr=0.01, lr_per=None, warmup_epochs=0, weight_decay=0.1),
    "lars": Optim(name="lars", lr=0.1, lr_per=None, warmup_epochs=0),
}


NAN, INF = float("nan"), float("inf")


def spoilt(optim, spoil=None, spoilt_layer=None):
    """All state after eight batches of which some are spoilt, that of the averaged encoder too, and the guard."""
    module, guard, ema = Tiny(optim, spoil), Guard(clip=optim.clip), EMA(0.9)
    left_out = lambda: (spoil or {}).get(module.step, ("", 0))[0] == "nothing"
    move = ema.move  # not where the step is left out, as in a run without it
    ema.move = lambda trained, step, total, held: move(trained, step, total, held | left_out())
    if spoilt_layer is not None:
        module.encoder[0].register_forward_hook(spoilt_layer(module))
    train(module, Loop(guard, ema=ema), accumulate=optim.accumulate)
    state = everything(module)
    return state | {f"ema/{name}": value for name, value in ema.encoder(module).state_dict().items()}, guard


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.filterwarnings("ignore:.*returned.*None.*")
@pytest.mark.parametrize("name", OPTIMS)
@pytest.mark.parametrize("where", ["views", "loss", "gradient"])
@pytest.mark.parametrize(("step", "value"), [(0, NAN), (3, INF), (7, NAN)])
def test_a_bad_step_is_a_step_that_did_not_happen(name, where, step, value):
    found, guard = spoilt(OPTIMS[name], {step: (where, value)})
    wanted, _ = spoilt(OPTIMS[name], {step: ("nothing", 0)})
    if step == 0 and name != "lars":  # there the optimiser has made its zeros for weights without gradient
        wanted = {key: value for key, value in wanted.items() if key in found}
    assert_same(found, wanted)
    assert guard.look(8)["skipped_steps"] == 1


@pytest.mark.parametrize("name", OPTIMS)
@pytest.mark.parametrize("value", [NAN, -INF])
def test_a_bad_activation_is_found_in_its_step(name, value):
    def spoil(module):
        bad = lambda: module.step == 3 and torch.is_grad_enabled()
        return lambda layer, inputs, output: output * value if bad() else None

    found, guard = spoilt(OPTIMS[name], spoilt_layer=spoil)
    assert_same(found, spoilt(OPTIMS[name], {3: ("loss", NAN)})[0])
    assert guard.look(8)["skipped_steps"] == 1


@pytest.mark.parametrize("where", ["weights", "average"])
def test_bad_weights_do_not_reach_the_average_and_end_the_run(where, tmp_path):
    class Injected(Tiny):
        """Has NaN in its own or its averaged weights after the third step, between the guard and the average."""

        def after_step(self, progress):
            if self.trainer.global_step == 3:
                self.before = [weight.clone() for weight in ema.encoder(None).parameters()]
                with torch.no_grad():
                    (ema.encoder(None) if where == "average" else self.encoder)[0].weight[0, 0, 0, 0] = NAN
                self.after = [weight.clone() for weight in self.parameters()]

    ema, module = EMA(0.9), Injected(OPTIMS["sgd"])
    curves, checkpoints = Curves(tmp_path / "metrics.csv", interval=8), Checkpoints(tmp_path, minutes=0)
    loop = Loop(Guard(checkpoints=tmp_path), checkpoints, ema=ema, curves=curves)
    with pytest.raises(UserError, match=r"3 steps in a row \(first at step 3\).*step-00000002"):
        train(module, loop, plugins=[SafeCheckpointIO()])
    assert newest(tmp_path).name == "step-00000002"  # nothing was saved from then on, though later steps had no NaN
    if where == "weights":
        assert all(map(torch.equal, module.before, ema.encoder(None).parameters()))
    else:
        assert all(map(torch.equal, module.after, module.parameters()))


def test_good_steps_are_as_without_it():
    module = Tiny(OPTIMS["sgd"])
    train(module)
    watched, guard = spoilt(OPTIMS["sgd"])
    for name, value in everything(module).items():
        assert torch.equal(value, watched[name]), name
    told = guard.look(8)
    assert told["skipped_steps"] == 0 and told["gradient_norm"] > 0
    assert "gradient_norm" not in guard.look(8)  # no step since


def test_one_bad_batch_holds_back_the_whole_accumulated_step():
    optim = replace(OPTIMS["sgd"], accumulate=2)
    found, _ = spoilt(optim, {4: ("views", NAN)})
    assert_same(found, spoilt(optim, {4: ("nothing", 0), 5: ("nothing", 0)})[0])


def test_gradients_are_clipped_to_their_total_norm():
    seen = []

    class Norms(Guard):
        def decide(self, step, optimizer, scaler=None):
            super().decide(step, optimizer, scaler)
            seen.append(torch.nn.utils.get_total_norm([p.grad for p in module.parameters()]).item())

    module, guard = Tiny(OPTIMS["sgd"]), Norms(clip=0.05)
    train(module, Loop(guard))
    assert max(seen) == pytest.approx(0.05, rel=1e-4)
    assert guard.look(8)["gradient_norm"] > 0.05  # it tells them as they were


def test_three_in_a_row_end_the_run_and_harm_nothing(tmp_path):
    module = Tiny(OPTIMS["sgd"], {step: ("loss", NAN) for step in (2, 3, 4)})
    curves = Curves(tmp_path / "metrics.csv", interval=8)
    with pytest.raises(UserError, match=r"3 steps in a row \(first at step 2\).*no checkpoint was written yet"):
        train(module, Loop(Guard(checkpoints=tmp_path / "checkpoints"), curves=curves))
    wanted, _ = spoilt(OPTIMS["sgd"], {step: ("nothing", 0) for step in range(2, 8)})
    for name, value in everything(module).items():
        assert torch.equal(value, wanted[name]), name  # the good steps after them were held back too


def test_the_last_good_checkpoint_is_named(tmp_path):
    (tmp_path / "step-00000001").mkdir()
    SafeCheckpointIO().save_checkpoint({"global_step": 1}, tmp_path / "step-00000001")
    guard = Guard(checkpoints=tmp_path)
    train(Tiny(OPTIMS["sgd"], {step: ("loss", NAN) for step in (5, 6, 7)}), Loop(guard))
    with pytest.raises(UserError, match=r"the last good checkpoint, .*step-00000001"):
        guard.look(8)
    assert not guard.healthy()


def test_two_in_a_row_are_named_and_the_run_goes_on(tmp_path, capsys):
    spoil = {2: ("gradient", NAN), 3: ("loss", INF), 5: ("views", NAN)}
    train(Tiny(OPTIMS["sgd"], spoil), Loop(curves=Curves(tmp_path / "metrics.csv", interval=4)))
    told = capsys.readouterr().err
    assert "2 of the steps before step 4" in told and "first: step 2; 2 in the whole run" in told
    assert "1 of the steps before step 8" in told and "first: step 5; 3 in the whole run" in told
    rows = read_curves(tmp_path / "metrics.csv")
    assert [row["skipped_steps"] for row in rows] == [2, 3]
    assert all(0 < row["loss"] < 10 and row["gradient_norm"] > 0 for row in rows)  # means over the good steps


def test_counts_survive_a_restart():
    guard, resumed = Guard(), Guard()
    train(Tiny(OPTIMS["sgd"], {6: ("loss", NAN), 7: ("loss", NAN)}), Loop(guard))
    resumed.load_state_dict(guard.state_dict())
    train(Tiny(OPTIMS["sgd"], {0: ("loss", NAN)}), Loop(resumed))
    with pytest.raises(UserError, match="3 steps in a row"):
        resumed.look(16)


def test_an_optimiser_that_cannot_skip_gets_no_bad_numbers():
    state, guard = spoilt(replace(OPTIMS["sgd"], fused=False), {3: ("gradient", NAN)})
    assert all(value.isfinite().all() for value in state.values()) and guard.look(8)["skipped_steps"] == 1


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::unique")
        self.count += function._schema.name.startswith(waits)
        return function(*args, **(kwargs or {}))


class Count(pl.Callback):
    """What has made the host wait before each batch; a CPU tensor answers some calls without an operator."""

    def __init__(self, monkeypatch):
        self.host, self.reads, self.seen = 0, Reads(), []
        for name in ("cpu", "numpy", "tolist", "item", "__bool__", "__float__", "__int__", "__index__"):
            original = getattr(torch.Tensor, name)

            def counted(tensor, *args, original=original, **kwargs):
                self.host += 1
                return original(tensor, *args, **kwargs)

            monkeypatch.setattr(torch.Tensor, name, counted)
        monkeypatch.setattr(torch.Tensor, "is_cpu", False)  # what is done on accelerators

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((self.host, self.reads.count))


@pytest.mark.parametrize("name", OPTIMS)
def test_nothing_waits_for_the_device_between_looks(name, monkeypatch, tmp_path):
    count, module = Count(monkeypatch), Tiny(OPTIMS[name])
    module.after_step = lambda progress: None
    loop = Loop(Guard(clip=1.0), ema=EMA(0.9), curves=Curves(tmp_path / "metrics.csv", interval=8))
    with count.reads:
        train(module, loop, callbacks=[count])
    assert count.seen[7] == count.seen[1], count.seen  # in the first step the optimiser makes its state
    assert count.host > count.seen[7][0] and count.reads.count > count.seen[7][1]  # the look at the end is counted


@pytest.mark.parametrize("kind", methods())
def test_no_method_waits_for_the_device_in_a_step(kind, monkeypatch):
    name, args = kind.default_encoder((16, 16))
    small = {"channels": [8, 8, 16, 16]} if name.startswith("resnet") else {}
    method, count = kind(encoder=Encoder(name, args | small, (16, 16))), Count(monkeypatch)

    class Views(Random):
        def _batch(self, number):
            views = [torch.rand(8, 3, 16, 16).mul(255).round() / 255 for _ in range(method.num_views)]
            return {"views": views, "key": Key(0, 0, torch.arange(8)), "label": torch.zeros(8, dtype=torch.int64)}

    with count.reads:
        train(method, Loop(), 4, callbacks=[count], data=Views(4))
    assert count.seen[3] == count.seen[1], count.seen  # a method may look at its first batch


def _one_rank(rank, world, port, queue):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    guard, module = Guard(), Tiny(OPTIMS["sgd"])
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1, fused=True)
    before = module.head.weight.detach().clone()
    guard.start(module, scaled=False)
    guard.before_step()
    loss = module.head(torch.ones(2, 4)).sum()
    loss.backward()
    guard.see(loss if rank == 0 else loss * NAN)
    guard.decide(0, optimiser)
    optimiser.step()
    queue.put((rank, guard.look(1)["skipped_steps"], torch.equal(before, module.head.weight)))
    torch.distributed.barrier()
    leave()


def test_a_loss_that_is_bad_on_one_process_holds_back_all(free_port):
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_one_rank, args=(2, free_port, queue), nprocs=2)
    assert sorted(queue.get() for _ in range(2)) == [(0, 1, True), (1, 1, True)]


# Diagnose: gradient norms and dead units, against what autograd and the network give by hand


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def network():
    module = Tiny(Optim(name="sgd", lr=1e-12, lr_per=None, warmup_epochs=0))
    with torch.no_grad():
        module.encoder[1].bias[:] = torch.tensor([-100.0, 0, 0, 0])  # one of four channels is dead
    return module


def test_rows_are_the_norms_and_dead_units_of_their_step(tmp_path):
    for _ in range(2):  # a new run drops the rows of an older one
        train(network(), Loop(diagnose=Diagnose(tmp_path / "diagnose.csv", interval=4)))
    assert [row["step"] for row in rows(tmp_path / "diagnose.csv")] == ["4"] * 4 + ["8"] * 4
    found = {row["layer"]: row for row in rows(tmp_path / "diagnose.csv") if row["step"] == "8"}
    assert list(found) == ["encoder.0", "encoder.1", "head", "encoder.2"]
    by_hand = network()
    by_hand.training_step(Random(8)._batch(7), 0)["loss"].backward()
    for name, layer in (("encoder.0", by_hand.encoder[0]), ("head", by_hand.head)):
        gradient = torch.cat([weight.grad.flatten() for weight in layer.parameters()]).norm().item()
        weights = torch.cat([weight.detach().flatten() for weight in layer.parameters()]).norm().item()
        assert float(found[name]["gradient_norm"]) == pytest.approx(gradient, rel=1e-4)
        assert float(found[name]["weight_norm"]) == pytest.approx(weights, rel=1e-4)
    assert float(found["encoder.2"]["dead"]) == 0.25 and found["head"]["dead"] == ""


def test_only_those_steps_are_watched(tmp_path):
    calls = []

    class Counted(Diagnose):
        def write(self, trainer):
            calls.append(len(self._hooks))
            super().write(trainer)

    module = network()
    train(module, Loop(diagnose=Counted(tmp_path / "diagnose.csv", interval=4)))
    assert calls == [0, 0, 0, 1, 0, 0, 0, 1]
    assert not any(part._forward_hooks for part in module.modules() if isinstance(part, nn.ReLU))
