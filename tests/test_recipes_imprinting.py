"""`imprint` on the proxy losses of pytorch-metric-learning."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses

from pairclip import AllPairsCosineLoss, PreservingLoss, embed_images, imprint
from pairclip.towers import random_tower

LABELS = torch.arange(20) % 4


@pytest.fixture(scope="module")
def tower():
    return random_tower(embedding_dim=8)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def means(tower, images):
    unit = F.normalize(embed_images(tower, images))
    return torch.stack([F.normalize(unit[c == LABELS].mean(0), dim=0) for c in range(4)])


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (losses.ArcFaceLoss, "W"),
        (losses.CosFaceLoss, "W"),
        (losses.NormalizedSoftmaxLoss, "W"),
        (losses.ProxyAnchorLoss, "proxies"),
        (losses.ProxyNCALoss, "proxies"),
    ],
)
def test_each_proxy_points_to_its_class(make, name, tower, images, means):
    loss = make(num_classes=4, embedding_size=8)
    weight = getattr(loss, name)
    before = weight.detach().clone()
    embedded = embed_images(tower, images)
    assert imprint(loss, tower, (images, LABELS)) is loss
    assert getattr(loss, name) is weight
    assert weight.requires_grad
    axis = 1 if name == "proxies" else 0
    proxies = weight.detach() if axis else weight.detach().T
    torch.testing.assert_close(F.normalize(proxies), means)
    torch.testing.assert_close(weight.norm(dim=axis), before.norm(dim=axis))
    logits = loss.get_logits(embedded) * (1 if loss.distance.is_inverted else -1)
    assert torch.equal(logits.argmax(dim=1), (F.normalize(embedded) @ means.T).argmax(dim=1))
    loss(embedded.requires_grad_(), LABELS).backward()
    assert weight.grad is not None


def test_several_centres_are_means_of_parts_of_their_class(tower, images, means):
    loss = losses.SoftTripleLoss(4, 8, centers_per_class=2)
    embedded = embed_images(tower, images)
    imprint(loss, tower, (images, LABELS))
    centres = F.normalize(loss.fc.detach().T).view(4, 2, 8)
    unit = F.normalize(embedded)
    for c in range(4):
        assert not torch.allclose(centres[c, 0], centres[c, 1])
        own = unit[c == LABELS]
        halves = [
            F.normalize(own[list(part)].mean(0), dim=0)
            for part in torch.combinations(torch.arange(5), 3).tolist()
        ]
        assert any(torch.allclose(centres[c, 0], half, atol=1e-5) for half in halves)
    cosines = torch.einsum("nd,ckd->nck", unit, centres)
    logits = ((loss.gamma * cosines).softmax(dim=2) * cosines).sum(dim=2)
    torch.testing.assert_close(loss.get_logits(embedded).detach(), logits)
    again = imprint(losses.SoftTripleLoss(4, 8, centers_per_class=2), tower, (images, LABELS))
    torch.testing.assert_close(F.normalize(again.fc.detach().T), centres.view(8, 8))


def test_a_class_of_fewer_images_than_centres_repeats_them(tower, images):
    loss = imprint(losses.SoftTripleLoss(2, 8, centers_per_class=3), tower, (images[:3], [0, 1, 1]))
    centres = F.normalize(loss.fc.detach().T).view(2, 3, 8)
    unit = F.normalize(embed_images(tower, images[:3]))
    torch.testing.assert_close(centres[0], unit[[0, 0, 0]])
    torch.testing.assert_close(centres[1, 0], centres[1, 2])
    assert not torch.allclose(centres[1, 0], centres[1, 1])


def test_classes_without_an_image_keep_their_proxies(tower, images):
    loss = losses.ProxyAnchorLoss(6, 8)
    before = loss.proxies.detach().clone()
    with pytest.warns(UserWarning, match="2 of 6 classes have no image"):
        imprint(loss, tower, (images, LABELS))
    assert torch.equal(loss.proxies[4:], before[4:])
    assert not torch.equal(loss.proxies[:4], before[:4])


def test_a_loss_may_be_inside_another(tower, images, means):
    loss = PreservingLoss(losses.ProxyAnchorLoss(4, 8), weight=1)
    imprint(loss, tower, (images, LABELS))
    torch.testing.assert_close(F.normalize(loss.loss.proxies.detach()), means)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (AllPairsCosineLoss(), TypeError, "got none in AllPairsCosineLoss"),
        (torch.nn.functional.mse_loss, TypeError, "got none in function"),
        (
            torch.nn.ModuleList([losses.ProxyAnchorLoss(4, 8) for _ in range(2)]),
            TypeError,
            "got 2 of them in ModuleList",
        ),
        (losses.ArcFaceLoss(4, 9), ValueError, "proxies of size 9, but `tower` makes .* size 8"),
        (losses.ArcFaceLoss(3, 8), ValueError, "class id 3, but `loss` has proxies for 3 classes"),
    ],
)
def test_what_can_not_be_imprinted_is_an_error(loss, error, message, tower, images):
    with pytest.raises(error, match=message):
        imprint(loss, tower, (images, LABELS))
