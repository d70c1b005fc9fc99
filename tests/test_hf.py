"""Metrics for the Trainer of transformers: by hand, and in its evaluation loop.

What needs torch or transformers is skipped without them: pip install ".[hf]". [n]: a line of docs/PITFALLS.md.
"""

import math
import pickle
import subprocess
import sys
import tracemalloc
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
from common import BFLOAT16, DTYPES, assert_same_bits, make_labels, make_logits, result_dtype

import numbaloss as nl
from numbaloss import hf

pytestmark = pytest.mark.usefixtures("one_thread")

EvalPrediction = namedtuple("EvalPrediction", "predictions label_ids")
CLASSES, LENGTHS = 50, (9, 4, 7, 2, 12, 5, 3)  # of the sequences: batches of three have 9, 12 and 3 tokens


def make_batches(dtype=np.float32, lengths=LENGTHS):
    """[(logits, labels)] of batches of three sequences, the shorter ones' labels filled up with -100."""
    batches = []
    for i in range(0, len(lengths), 3):
        part = lengths[i : i + 3]
        rows, time = len(part), max(part)
        labels = make_labels(rows * time, CLASSES, seed=i).reshape(rows, time)
        labels[np.arange(time) >= np.array(part)[:, None]] = -100
        batches.append((make_logits(rows * time, CLASSES, dtype, seed=i).reshape(rows, time, CLASSES), labels))
    return batches


def concatenated(arrays):
    """What the Trainer makes of batches: shorter ones are filled up with -100 along the second axis."""
    if isinstance(arrays[0], tuple):
        return tuple(concatenated(part) for part in zip(*arrays))
    time = max(x.shape[1] for x in arrays)
    pads = [((0, 0), (0, time - x.shape[1]), (0, 0))[: x.ndim] for x in arrays]
    return np.concatenate([np.pad(x, pad, constant_values=-100) for x, pad in zip(arrays, pads)])


def metrics_of(evaluation):
    fields = evaluation.result()._asdict()
    return {name: value for name, value in fields.items() if name != "weight"}


def expected(batches, shift=1):
    evaluation = nl.Evaluation()
    for logits, labels in batches:
        evaluation.update(logits[:, : logits.shape[1] - shift], labels[:, shift:])
    return metrics_of(evaluation)


# -- by hand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shift", [0, 1, 2])
def test_all_ways(shift, dtype):
    """[25] Whole, scored, in lists and batch by batch: the bits of Evaluation, as numbers of Python's."""
    batches, metrics = make_batches(dtype), hf.Metrics(shift)
    want = expected(batches, shift)
    assert want["tokens"] == sum(max(0, n - shift) for n in LENGTHS)
    scored = [(metrics.preprocess_logits_for_metrics(x, y), y) for x, y in batches]
    for logits, labels in batches:  # aligned as the logits are
        logprob, argmax = metrics.preprocess_logits_for_metrics(logits, labels)
        n = labels.shape[1] - shift
        scores = nl.score_tokens(logits[:, :n], labels[:, shift:])
        assert logprob.shape == argmax.shape == labels.shape and logprob.dtype == result_dtype(dtype)
        assert_same_bits((logprob[:, :n], argmax[:, :n]), (scores.logprob, scores.argmax))
        assert (logprob[:, n:] == 0).all() and (argmax[:, n:] == -1).all()
    for parts in (batches, scored):
        predictions, labels = (list(x) for x in zip(*parts))
        whole = EvalPrediction(concatenated(predictions), concatenated(labels))
        got = metrics.compute_metrics(whole)
        assert got == want
        assert [type(v) for v in got.values()] == [float] * 5 + [int]
        assert metrics.compute_metrics(EvalPrediction(predictions, labels)) == want
        for _ in range(2):  # the last batch of an evaluation leaves nothing for the next
            for x, y in parts[:-1]:
                assert metrics.compute_metrics(EvalPrediction(x, y), compute_result=False) == {}
                assert metrics.compute_metrics(whole) == want  # beside it
            assert metrics.compute_metrics(EvalPrediction(*parts[-1]), compute_result=True) == want


def test_what_models_give():
    """Logits come first among a model's outputs; classifiers have a label a sequence; -100 is padding beside any
    ignore_index; no labels, no scores."""
    (logits, labels), *_ = batches = make_batches()
    want = expected(batches[:1])
    for predictions in ((logits,), [logits], (logits, logits[..., :3]), [logits, (labels, labels)]):
        assert hf.Metrics().compute_metrics((predictions, labels)) == want
        scored = hf.Metrics().preprocess_logits_for_metrics(predictions, labels)
        assert hf.Metrics().compute_metrics((scored, labels)) == want
    assert hf.Metrics().preprocess_logits_for_metrics(logits, None) is logits
    flat = hf.Metrics(shift=0)
    scored = flat.preprocess_logits_for_metrics(logits[:, 0], labels[:, 0])
    for predictions in (logits[:, 0], scored):
        got = flat.compute_metrics((predictions, labels[:, 0]))
        assert got == metrics_of(nl.Evaluation().update(logits[:, 0], labels[:, 0]))
    labels = np.where(labels == 7, 8, labels)
    sevens = np.where(np.arange(labels.shape[1]) % 3 == 2, 7, labels)
    got = hf.Metrics(ignore_index=7).compute_metrics((logits, sevens))
    assert got == expected([(logits, np.where(sevens == 7, -100, sevens))]) and got["tokens"] < want["tokens"]


def test_nothing_to_look_at():
    """[9] No tokens: their number is 0 and the rest NaN; sequences no longer than the shift; labels without logits."""
    (logits, labels), *_ = make_batches()
    nothing = np.full_like(labels, -100)
    for x, y in ((logits, nothing), (logits[:, :1], labels[:, :1]), (logits[:, :0], labels[:, :0])):
        for shift in (1, 3) if y is not nothing else (0, 1, 99):
            metrics = hf.Metrics(shift)
            for predictions in (x, metrics.preprocess_logits_for_metrics(x, y)):
                *numbers, tokens = metrics.compute_metrics((predictions, y)).values()
                assert tokens == 0 and all(math.isnan(v) for v in numbers)
    wild = labels.copy()
    wild[:, 0] = 10**6  # no logits are of it
    assert hf.Metrics().compute_metrics((logits, wild)) == expected([(logits, labels)])
    assert wild[0, 0] == 10**6


def test_logits_are_not_copied():
    """[12] Read where they lie, in any layout; neither they nor the labels are written."""
    logits, labels = concatenated([x for x, _ in make_batches()]), concatenated([y for _, y in make_batches()])
    want = hf.Metrics().compute_metrics((logits, labels))
    store = np.full((*logits.shape[:2], CLASSES + 3), 7, np.float32)
    store[..., :CLASSES] = logits
    for x in (store[..., :CLASSES], np.asfortranarray(logits), logits[::-1][::-1]):
        x.flags.writeable = labels.flags.writeable = False
        assert hf.Metrics().compute_metrics((x, labels)) == want
        assert hf.Metrics().compute_metrics((x, labels.astype(np.int32))) == want
    huge = np.broadcast_to(make_logits(1, 1 << 20)[0], (4, 64, 1 << 20))  # 1 GB if it were copied
    few = np.full((4, 64), -100)
    few[2, 5:8] = 0, 7, 1 << 19
    hf.Metrics().compute_metrics((huge[:, :9], few[:, :9]))  # compiles
    tracemalloc.start()
    got = hf.Metrics().compute_metrics((huge, few))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert got["tokens"] == 3 and peak < 1 << 20


def test_errors():
    """Each says argument, expected, got; what broke off leaves nothing behind."""
    (logits, labels), *_ = batches = make_batches()
    bad, metrics = labels.copy(), hf.Metrics()
    bad[1, 2] = CLASSES
    scored = metrics.preprocess_logits_for_metrics(logits, labels)
    for kind, match, predictions, label_ids in (
        (ValueError, r"label_ids: expected shape \(3, 9\) to match logits .*, got \(3, 8\)", logits, labels[:, :8]),
        (ValueError, r"label_ids: expected shape \(3, 8\)", logits[:, :8], labels),
        (ValueError, r"predictions: expected .* \(batch, time, classes\) .*, got \(3, 50\)", logits[:, 0], labels),
        (ValueError, r"label_ids: expected values in \[0, 50\), got 50 at position \(1, 2\)", logits, bad),
        (ValueError, r"label_ids: expected shape \(3, 9\)", scored, labels[:, :8]),
        (ValueError, r"predictions: expected shape \(3, 9\) to match", (scored[0], scored[1][:2]), labels),
        (ValueError, "label_ids: expected 1 batches as predictions has, got 2", [logits], [labels, labels]),
        (TypeError, "label_ids: expected one array, got a tuple of 2", logits, (labels, labels)),
        (TypeError, "label_ids: expected integers, got dtype float64", logits, labels / 2),
        (TypeError, "label_ids: expected real numbers, got dtype object", logits, None),
        (TypeError, "predictions: expected dtype float16.*got int64", labels[..., None], labels),
        (TypeError, "predictions: expected a NumPy or CuPy array, got NoneType", None, labels),
        (TypeError, "predictions: expected a NumPy or CuPy array, got dict", {"logits": logits}, labels),
    ):
        metrics.compute_metrics((logits, labels), compute_result=False)
        with pytest.raises(kind, match=match):
            metrics.compute_metrics(EvalPrediction(predictions, label_ids), compute_result=False)
        assert metrics.compute_metrics(batches[1], compute_result=True) == expected(batches[1:2])
    metrics.compute_metrics((logits, labels), compute_result=False)
    metrics.reset()
    assert metrics.compute_metrics(batches[1], compute_result=True) == expected(batches[1:2])
    with pytest.raises(ValueError, match=r"logits: expected shape \(batch, \.\.\., classes\), got \(50,\)"):
        hf.Metrics(0).preprocess_logits_for_metrics(logits[0, 0], labels[0, 0])
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 50\), got 50 at position \(1, 2\)"):
        metrics.preprocess_logits_for_metrics(logits, bad)
    with pytest.raises(ValueError, match="shift: expected 0 or more, got -1"):
        hf.Metrics(-1)
    with pytest.raises(TypeError, match="shift: expected an integer, got float"):
        hf.Metrics(1.0)


def test_import_and_pickle():
    """Neither numbaloss nor this module of it imports torch or transformers."""
    code = "import sys, numbaloss; assert 'numbaloss.hf' not in sys.modules; import numbaloss.hf\n"
    code += "assert not {'torch', 'transformers', 'cupy', 'ml_dtypes'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    metrics = pickle.loads(pickle.dumps(hf.Metrics(0, ignore_index=-1)))
    assert repr(metrics) == "Metrics(shift=0, ignore_index=-1)"


# -- other devices -------------------------------------------------------------------------------------------------


class Tensor:
    """As much of a torch tensor as is looked at, on a device whose memory cannot be read."""

    def __init__(self, x, device="cuda"):
        self.x, self.device, self.dtype = x, SimpleNamespace(type=device), x.dtype

    def detach(self):
        return self

    def to(self, device):
        return Tensor(self.x, device.type)

    def cpu(self):
        return Tensor(self.x, "cpu")

    def view(self, dtype):
        return Tensor(self.x.view(dtype), self.device.type)

    def __dlpack_device__(self):
        return {"cpu": 1, "cuda": 2, "mps": 8}[self.device.type], 0

    def __dlpack__(self, **options):
        assert self.device.type == "cpu"
        return self.x.__dlpack__(**options)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_devices_that_cannot_be_read(device, monkeypatch):
    """Without CuPy, or on a device that it does not know, logits come to the host and scores go back."""
    torch = SimpleNamespace(Tensor=Tensor, bfloat16=None, from_numpy=lambda x: Tensor(x, "cpu"))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(hf, "_has_cuda_kernels", lambda: device == "mps")
    batches, metrics = make_batches(), hf.Metrics()
    for last, (logits, labels) in enumerate(batches, 1 - len(batches)):
        logits, labels = Tensor(logits, device), Tensor(labels, device)
        scored = metrics.preprocess_logits_for_metrics((logits, logits), labels)
        assert [x.device.type for x in scored] == [device] * 2
        predictions = scored if last % 2 else logits
        got = metrics.compute_metrics((predictions, labels), compute_result=last == 0)
    assert got == expected(batches)


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_cupy(name, monkeypatch):
    """CuPy arrays, and tensors on a GPU by DLPack, are scored on their device, to the bits of NumPy's."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    host = pytest.importorskip("cuda_on_host", reason="greenlet is not installed")
    if host.ON_DEVICE:
        pytest.skip("there is a GPU: tensors that stand in for torch's lie on the host")

    torch = SimpleNamespace(Tensor=Tensor, bfloat16=BFLOAT16, int16=np.int16)
    torch.from_dlpack = lambda x: Tensor(host.to_numpy(x))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(cupy, "from_dlpack", lambda x: host.to_cupy(x.x))
    batches, metrics = make_batches(DTYPES[name])[1:], hf.Metrics()
    want = [metrics.preprocess_logits_for_metrics(*batch) for batch in batches]
    with host.on_host():
        for make, kind in ((host.to_cupy, cupy.ndarray), (Tensor, Tensor)):
            for last, (logits, labels) in enumerate(batches, 1 - len(batches)):
                given = make(logits), make(labels)
                scored = metrics.preprocess_logits_for_metrics(*given)
                assert all(isinstance(x, kind) for x in scored)
                assert_same_bits(tuple(host.results(getattr(x, "x", x)) for x in scored), want[last - 1])
                got = metrics.compute_metrics((scored, given[1]), compute_result=last == 0)
            assert got == expected(batches)
            assert metrics.compute_metrics(given) == expected(batches[-1:])
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert not hf._has_cuda_kernels()


# -- torch and transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64"])
def test_tensors(name, monkeypatch):
    """[15] Tensors in give tensors out, with the bits of arrays; those of bfloat16 without ml_dtypes too."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    (array, labels), *_ = make_batches(DTYPES[name])
    want, metrics = expected([(array, labels)]), hf.Metrics()
    logits = torch.from_numpy(array.astype(np.float64)).to(getattr(torch, name)).requires_grad_()
    labels = torch.from_numpy(labels)
    inside = torch.zeros(*logits.shape[:2], CLASSES + 3, dtype=logits.dtype)
    inside[..., :CLASSES] = logits.detach()
    for x in (logits, logits.detach(), inside[..., :CLASSES], logits.transpose(0, 1).contiguous().transpose(0, 1)):
        scored = metrics.preprocess_logits_for_metrics(x, labels)
        assert [s.dtype for s in scored] == [torch.float64 if name == "float64" else torch.float32, torch.int64]
        assert not any(s.requires_grad for s in scored)
        for predictions in (x, scored):
            assert metrics.compute_metrics((predictions, labels)) == want
    read = hf._array(logits, "logits")
    assert read.dtype == array.dtype and read.__array_interface__["data"][0] == logits.data_ptr()
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert metrics.compute_metrics((logits, labels)) == want
    assert hf._array(logits, "logits").dtype == (np.float32 if array.dtype == BFLOAT16 else array.dtype)


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A function that makes a Trainer of a tiny model, with options of TrainingArguments."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    data = [{"input_ids": rng.integers(0, CLASSES, n)} for n in LENGTHS]

    def collate(rows, first=True):
        sequences = [torch.from_numpy(row["input_ids"]) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        labels = pad(sequences, batch_first=True, padding_value=-100)
        labels[:, 0] = labels[:, 0] if first else -100
        mask = pad([torch.ones_like(s) for s in sequences], batch_first=True)
        return {"input_ids": pad(sequences, batch_first=True), "attention_mask": mask, "labels": labels}

    def make(metrics=None, preprocess=False, batch=3, dtype=None, outputs=False, first=True, **options):
        torch.manual_seed(0)
        sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": CLASSES}
        sizes |= {"bos_token_id": None, "eos_token_id": None}
        config = transformers.GPT2Config(**sizes, initializer_range=0.5, output_hidden_states=outputs)
        model = transformers.GPT2LMHeadModel(config).to(dtype or torch.float32)
        options = {"per_device_eval_batch_size": batch, "report_to": [], "use_cpu": True, **options}
        return transformers.Trainer(
            model,
            transformers.TrainingArguments(str(tmp_path), disable_tqdm=True, **options),
            data_collator=lambda rows: collate(rows, first),
            eval_dataset=data,
            compute_metrics=metrics.compute_metrics if metrics else None,
            preprocess_logits_for_metrics=metrics.preprocess_logits_for_metrics if metrics and preprocess else None,
        )

    yield make
    torch.set_num_threads(threads)


def evaluated(trainer):
    """The metrics of an evaluation that are ours."""
    names = "loss", "perplexity", "bits_per_token", "accuracy", "standard_error", "tokens"
    found = trainer.evaluate()
    return {name: found[f"eval_{name}"] for name in names}


@pytest.mark.parametrize("preprocess", [False, True])
def test_trainer(trainer, preprocess):
    """However the Trainer collects batches, metrics have the bits of Evaluation, and are those of torch."""
    import torch

    output = trainer(hf.Metrics()).predict(trainer().eval_dataset)
    logits, labels = output.predictions, output.label_ids
    want = expected([(logits, labels)])
    assert logits.shape == (7, 12, CLASSES) and want["tokens"] == sum(LENGTHS) - len(LENGTHS)
    rows, targets = torch.from_numpy(logits[:, :-1].reshape(-1, CLASSES)), torch.from_numpy(labels[:, 1:].reshape(-1))
    exact = torch.nn.functional.cross_entropy(rows.double(), targets).item()
    assert abs(want["loss"] - exact) <= 4 * 2.0**-23 * exact
    assert want["accuracy"] == (rows.argmax(-1) == targets)[targets >= 0].double().mean().item()
    # The Trainer's is a mean of tokens too in one batch, and where it cannot count a first label that no logits are of
    theirs = trainer(batch=len(LENGTHS), first=False).evaluate()["eval_loss"]
    assert abs(want["loss"] - theirs) <= want["tokens"] * 2.0**-23 * exact
    assert abs(want["loss"] - trainer(first=False).evaluate()["eval_loss"]) > 1e-3
    for options in (
        {},
        {"batch_eval_metrics": True},
        {"eval_do_concat_batches": False},
        {"eval_accumulation_steps": 1},
        {"eval_accumulation_steps": 2, "eval_do_concat_batches": False},
        {"first": False},
        {"outputs": True},
        {"outputs": True, "batch_eval_metrics": True},
    ):
        one = trainer(hf.Metrics(), preprocess, **options)
        assert evaluated(one) == want, options
        assert evaluated(one) == want, options  # again
    found = trainer(hf.Metrics(), True).predict(trainer().eval_dataset)
    assert [x.shape for x in found.predictions] == [labels.shape] * 2
    assert found.metrics["test_perplexity"] == want["perplexity"]


@pytest.mark.parametrize("batch_eval_metrics", [False, True])
def test_trainer_bfloat16(trainer, batch_eval_metrics):
    """The Trainer widens bfloat16 logits for NumPy; scored before, or batch by batch, they are read as they are."""
    import torch

    options = {"dtype": torch.bfloat16, "batch_eval_metrics": batch_eval_metrics}
    want = evaluated(trainer(hf.Metrics(), dtype=torch.bfloat16))
    for preprocess in (False, True):
        assert evaluated(trainer(hf.Metrics(), preprocess, **options)) == want


def test_trainer_trains(trainer):
    """Evaluations in the course of training, the best model being picked by a metric."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 6, "learning_rate": 0.01, "logging_steps": 2}
    options |= {"save_strategy": "no", "batch_eval_metrics": True}
    one = trainer(hf.Metrics(), True, **options)
    one.train_dataset = one.eval_dataset
    one.train()
    losses = [entry["eval_loss"] for entry in one.state.log_history if "eval_loss" in entry]
    assert len(losses) == 3 and losses[2] < losses[0]
    assert evaluated(one)["loss"] == losses[2]
