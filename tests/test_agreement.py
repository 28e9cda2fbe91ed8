"""What is said at the start of a fit, and where a fit can't be: threads, modes, other processes."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pytorch_metric_learning import losses as pml
from runs import LOSS, At, photos, plain_tower

from pairclip import (
    AllPairsCosineLoss,
    Finetuner,
    ImageIndex,
    LabelledImages,
    PairSampler,
    WeightAverage,
    cache_features,
    check_images,
    embed_images,
    evaluate,
    evaluate_embeddings,
    newest_checkpoint,
    occlusion_saliency,
)
from pairclip.datasets import StreamBatches
from pairclip.embedding import lost_processes_named, processes
from pairclip.finetuner.agreement import one_fit_at_a_time
from pairclip.towers import random_tower


def finetuner(**arguments: Any) -> Finetuner:
    return Finetuner(plain_tower(), LOSS, **arguments)


def test_a_fit_beside_another_thread_is_refused_and_one_after_it_is_not() -> None:
    refused, ended = [], threading.Event()

    def beside() -> None:
        try:
            finetuner().fit(photos(), batch_size=6, max_steps=1)
        except RuntimeError as error:
            refused.append(str(error))
        ended.set()

    def start() -> None:
        threading.Thread(target=beside).start()
        assert ended.wait(60)

    finetuner(callbacks=[At(1, start)]).fit(photos(), batch_size=6, max_steps=2)
    assert len(refused) == 1
    assert refused[0].startswith("Another thread of this program is in a fit")
    thread = threading.Thread(target=beside)
    thread.start()
    thread.join()
    assert len(refused) == 1


def test_a_process_that_was_forked_beside_a_fit_may_fit() -> None:
    going, ended = threading.Event(), threading.Event()
    wait = At(1, lambda: (going.set(), ended.wait(60)))
    fit = finetuner(callbacks=[wait]).fit
    thread = threading.Thread(target=fit, args=[photos()], kwargs={"batch_size": 6, "max_steps": 1})
    thread.start()
    going.wait(60)
    child = os.fork()
    if not child:
        try:
            with one_fit_at_a_time():
                os._exit(0)
        finally:
            os._exit(1)
    ended.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_a_tower_of_inference_alone_is_refused() -> None:
    with torch.inference_mode():
        tower = plain_tower()
    with pytest.raises(ValueError, match=r"`tower` was made inside `torch.inference_mode\(\)`"):
        Finetuner(tower, LOSS).fit(photos(), batch_size=6, max_steps=1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_fit_within_a_mode_without_gradients_trains(mode: Any) -> None:
    expected = finetuner().fit(photos(), batch_size=6, max_steps=2)
    tower = plain_tower()
    with mode():
        history = Finetuner(tower, LOSS).fit(photos(), batch_size=6, max_steps=2)
        assert not torch.is_grad_enabled()
    assert history == expected


def test_a_callback_may_change_the_folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    leave = At(1, lambda: monkeypatch.chdir(tmp_path / "elsewhere"))
    finetuner(callbacks=[leave]).fit(photos(), batch_size=6, max_steps=2, checkpoint_dir="saved")
    assert newest_checkpoint(tmp_path / "saved").step == 2
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_default_device_changes_nothing(tmp_path: Path) -> None:
    # Whatever is made there has no values, so none may be.
    rows, labels = torch.randn(12, 8), torch.arange(12) % 3
    trunk, head = random_tower(image_size=8, patch_size=4).split(0)
    tower, images = plain_tower(), photos()
    with torch.device("meta"):
        for form in ("linear", "squared"):
            AllPairsCosineLoss(negatives=form)(rows, labels)
        assert len([*PairSampler(labels, 4)]) == 3
        evaluation = evaluate_embeddings(rows, labels, exclude=[None] * 12)
        index = ImageIndex(
            rows.half(), labels=labels, class_names=list("abc"), paths=None, fingerprint="none"
        )
        index.save(tmp_path / "index")
        assert len(ImageIndex.load(tmp_path / "index").nearest_neighbors(rows, 2)[1]) == 12
        Finetuner(tower, LOSS, callbacks=[WeightAverage(0.9)]).fit(
            images, batch_size=6, max_steps=2, eval_dataset=images, checkpoint_dir=tmp_path / "fit"
        )
        features = cache_features(trunk, images, tmp_path)
        assert 0 <= evaluate(head, features).recall_at_1 <= 1
        assert check_images(images) == []
        stream = StreamBatches([*zip(*images, strict=True)], tower.preprocess, 2, 2, buffer_size=8)
        assert next(iter(stream))[0].device.type == "cpu"
        Finetuner(tower, LOSS).fit(stream, max_steps=1)
        saliency = occlusion_saliency(tower, images[0][0], images[0][1], grid=2)
        assert saliency.falls.isfinite().all()
    assert evaluation.recall_at_1 == evaluate_embeddings(rows, labels).recall_at_1


def test_a_call_that_not_all_processes_make_is_told(monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr("pairclip.embedding.processes._SOON", 0.01)
    monkeypatch.setattr("pairclip.embedding.processes._PATIENCE", 0.02)

    def alone(*_: Any) -> None:
        time.sleep(0.2)
        raise RuntimeError("Timed out waiting 200ms for recv operation to complete")

    monkeypatch.setattr(torch.distributed, "all_gather_object", alone)
    message = r"^Process 0 can't go on: .*did not come in time.*let all processes make it"
    with pytest.raises(RuntimeError, match=message):
        embed_images(plain_tower(), [Image.new("RGB", (8, 8))])
    said = capsys.readouterr().err
    assert said.startswith("Process 0 has waited 0 s for other processes: `embed_images`, as")


def test_a_connection_that_breaks_is_another_process_that_failed(monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    message = r"^Process 3 can't go on: another process has failed, was.*closed by peer"
    with pytest.raises(RuntimeError, match=message), lost_processes_named():
        raise RuntimeError("[pair.cc:534] Connection closed by peer [127.0.0.1]:13552")
    several = processes._lost(RuntimeError("Socket closed"), [1, 2])
    assert "can't go on: processes 1 and 2 have failed, were ended, or did" in str(several)
    with pytest.raises(RuntimeError, match=r"^something else$"), lost_processes_named():
        raise RuntimeError("something else")


# Looked at before the first step


def files(folder: Path, count: int = 8) -> tuple[list[str], list[int]]:
    folder.mkdir()
    paths = [str(folder / f"{number}.png") for number in range(count)]
    for path, picture in zip(paths, photos()[0], strict=False):
        Image.fromarray(picture).save(path)
    return paths, [number % 2 for number in range(count)]


def fit(*data: Any, **arguments: Any) -> None:
    tower = plain_tower()
    Finetuner(tower, LOSS).fit(*data, batch_size=4, max_steps=1, **arguments)


def test_missing_files_are_named_before_the_first_step(tmp_path: Path) -> None:
    train, test = files(tmp_path / "train"), files(tmp_path / "test")
    for check in (None, "paths", "decode"):
        fit(train, eval_dataset=test, check=check)
    Path(test[0][3]).unlink()
    for check in (None, "paths", "decode"):
        with pytest.raises(ValueError, match=r"`eval_dataset` has 1 of 8 images .*3\.png: "):
            fit(train, eval_dataset=test, check=check)
    Path(train[0][5]).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"`dataset` has 1 of 8 images that can't be .*5\.png: "):
        fit(train, check="decode")
    Path(train[0][5]).unlink()
    with pytest.raises(ValueError, match=r"`dataset` .*5\.png: there is no such file"):
        fit(train, check="paths")


def test_an_evaluation_that_can_find_nothing_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="`eval_dataset` has 3 images, each alone in its class"):
        finetuner().fit(photos(), batch_size=6, eval_dataset=(photos()[0][:3], [0, 1, 2]))


def test_what_to_check_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="`check` must be one of 'paths', 'decode', got 'all'"):
        finetuner().fit(photos(), check="all")


# Said


def test_the_default_batch_is_no_larger_than_a_small_dataset_fills() -> None:
    with pytest.warns(UserWarning, match="`batch_size` is 128 by default, more than .* its 24 im"):
        history = finetuner().fit(photos(), max_steps=1)
    assert len(history.steps) == 1


@pytest.mark.parametrize(
    "loss",
    [
        lambda: pml.ArcFaceLoss(num_classes=2, embedding_size=8),
        lambda: pml.ProxyAnchorLoss(num_classes=2, embedding_size=8),
        lambda: pml.NormalizedSoftmaxLoss(num_classes=2, embedding_size=8),
    ],
)
def test_class_ids_that_a_loss_has_no_proxy_for(loss: Any) -> None:
    pictures, labels = photos()
    data = (pictures[:16], [2 + label % 2 for label in labels[:16]])
    with pytest.raises(ValueError, match=r"class ids of this batch, 2 to 3: .*relabel=True"):
        Finetuner(plain_tower(), loss()).fit(data, batch_size=8, max_steps=1)
    relabelled = LabelledImages(data, relabel=True)
    assert len(Finetuner(plain_tower(), loss()).fit(relabelled, batch_size=8).steps) == 2
