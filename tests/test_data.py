"""CaptionedImages reads what people have, the tokenizer reads what people write."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_minimal import CaptionedImages, TextConfig, TextEncoder, Tokenizer


def imagefolder(path, images):
    """A folder of the images, each with the caption "image <its number>"."""
    path.mkdir()
    lines = []
    for i, image in enumerate(images):
        image.save(path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"image {i}", "more": i}))
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return path


def read(path, images, size):
    return CaptionedImages.from_folder(imagefolder(path, images), size)


def test_pixels_and_captions_arrive_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    data = read(tmp_path / "set", [Image.fromarray(image) for image in pixels], 8)
    assert len(data) == 2 and data.captions == ["image 0", "image 1"]
    assert data.rows[1]["more"] == 1
    np.testing.assert_array_equal(data.images.permute(0, 2, 3, 1).numpy(), pixels)
    x = torch.from_numpy(pixels[1]).permute(2, 0, 1) / 255 * 2 - 1
    torch.testing.assert_close(data.batch(torch.tensor([1]))[0], x)


def test_the_middle_square_is_cut_out_and_resized(tmp_path):
    """Of a wide red image with a blue middle square, only blue arrives.

    Nearly: the filter takes a hundredth from beyond the cut.
    """
    image = Image.new("RGB", (60, 20), "red")
    image.paste("blue", (20, 0, 40, 20))
    data = read(tmp_path / "set", [image], 10)
    red, green, blue = data.images[0].flatten(1).float().mean(dim=1).tolist()
    assert red < 4 and green == 0 and blue > 251
    assert data.images[0, :, 5, 5].tolist() == [0, 0, 255]


def test_a_photograph_taken_sideways_is_shown_upright(tmp_path):
    image = Image.new("RGB", (8, 8), "red")
    image.paste("blue", (0, 0, 8, 4))  # blue above red, marked as lying on its side
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = imagefolder(tmp_path / "set", [image])
    image.save(folder / "0.png", exif=exif)
    upright = CaptionedImages.from_folder(folder, 8).images[0]
    assert upright[:, 0, 7].tolist() == [0, 0, 255] and upright[:, 0, 0].tolist() == [255, 0, 0]


def test_unusual_line_separators_inside_a_caption_are_kept(tmp_path):
    folder = imagefolder(tmp_path / "set", [Image.new("RGB", (4, 4))])
    line = '\n{"file_name": "0.png", "text": "a\u2028b"}\r\n'
    (folder / "metadata.jsonl").write_text(line, encoding="utf-8-sig")
    assert CaptionedImages.from_folder(folder, 4).captions == ["a\u2028b"]


def test_transparency_becomes_white_and_grey_becomes_colour(tmp_path):
    transparent = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    grey = Image.new("L", (4, 4), 100)
    bits = Image.new("1", (4, 4), 1)
    data = read(tmp_path / "set", [transparent, grey, bits], 4)
    assert data.images[:, :, 0, 0].tolist() == [[255] * 3, [100] * 3, [255] * 3]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 has no 'file_name'"),
        ('{"text": "a"}', "line 2 has no 'file_name'"),
        ('{"file_name": "0.png"}', "line 2 has no 'text'"),
        ('{"file_name": "0.png", "text": 3}', "line 2 has no 'text'"),
        ('{"file_name": "gone.png", "text": "a"}', "gone.png is named .* but does not exist"),
        ('{"file_name": "metadata.jsonl", "text": "a"}', "metadata.jsonl is not an image"),
    ],
)
def test_errors_name_the_line_or_the_file(tmp_path, line, message):
    path = imagefolder(tmp_path / "set", [Image.new("RGB", (4, 4))])
    (path / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a"}\n' + line)
    with pytest.raises(ValueError, match=message):
        CaptionedImages.from_folder(path, 4)


def test_captions_that_are_not_utf8_are_refused(tmp_path):
    path = imagefolder(tmp_path / "set", [Image.new("RGB", (4, 4))])
    line = '\n{"file_name": "0.png", "text": "caf\xe9"}'
    (path / "metadata.jsonl").write_bytes(line.encode("latin-1"))
    with pytest.raises(ValueError, match="line 2 is not UTF-8"):
        CaptionedImages.from_folder(path, 4)


def test_a_folder_without_captions_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="metadata.jsonl does not exist; it holds one"):
        CaptionedImages.from_folder(tmp_path, 4)


def test_pairs_are_rows_with_the_same_mark():
    marks = [7, None, 3, 7, 3, 9]
    rows = [{"text": ""} | ({} if mark is None else {"pair": mark}) for mark in marks]
    images = torch.zeros(6, 3, 4, 4, dtype=torch.uint8)
    assert CaptionedImages(images, [""] * 6, rows).pairs().tolist() == [[0, 3], [2, 4]]
    assert CaptionedImages(images, [""] * 6).pairs() is None
    somebody_elses = [{"text": "", "pair": ["left", "right"]}] * 6
    assert CaptionedImages(images, [""] * 6, somebody_elses).pairs() is None


def test_tensors_need_no_folder():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).reshape(2, 3, 4, 4)
    data = CaptionedImages(images, ["a", "b"])
    assert len(data) == 2 and data.rows == [{"text": "a"}, {"text": "b"}]
    torch.testing.assert_close(data.batch(slice(0, 2)), images / 255 * 2 - 1)


# ---- the tokenizer ----


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a red circle above a blue square", "a red star"] * 10, 600)


def ids_of(tokenizer, pieces):
    return [tokenizer.vocab[piece] for piece in pieces]


def test_a_caption_is_start_pairs_end_and_ends_to_77(tokenizer):
    tokens = tokenizer(["a red circle", ""])
    assert tokens.shape == (2, 77) and tokens.dtype == torch.long
    assert tokens[:, 0].tolist() == [tokenizer.start] * 2
    assert tokenizer.pieces("a red circle") == ["a</w>", "red</w>", "circle</w>"]
    assert tokens[0, 1:4].tolist() == ids_of(tokenizer, ["a</w>", "red</w>", "circle</w>"])
    assert (tokens[0, 4:] == tokenizer.end).all() and (tokens[1, 1:] == tokenizer.end).all()


def test_the_marks_are_the_last_two_of_the_vocabulary(tokenizer):
    assert sorted(tokenizer.vocab.values()) == list(range(len(tokenizer.vocab)))
    assert tokenizer.end == len(tokenizer.vocab) - 1 == tokenizer.start + 1


def test_case_and_space_do_not_matter_and_anything_has_tokens(tokenizer):
    assert torch.equal(tokenizer(["A  Red\n CIRCLE"]), tokenizer(["a red circle"]))
    strange = "naïve ☃ 😀 日本 42 don't!"
    pieces = tokenizer.pieces(strange)
    tokens = tokenizer([strange])[0]
    assert tokens[1 : 1 + len(pieces)].tolist() == ids_of(tokenizer, pieces)


def test_a_long_caption_is_cut_with_a_warning_that_says_what_was_cut(tokenizer):
    said = "the caption has 80 tokens, 75 fit; cut off: 'a Circle a red star'"
    with pytest.warns(UserWarning, match=said):
        tokens = tokenizer(["a red Star " * 25 + "a Circle a red star"])
    assert tokens[0, -1] == tokenizer.end and (tokens[0, :-1] != tokenizer.end).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["a red star " * 25])  # 75 tokens just fit


def test_saved_and_loaded_it_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    captions = ["a red circle", "Something NEW, isn't it?"]
    assert torch.equal(again(captions), tokenizer(captions)) and again.merges == tokenizer.merges


def test_merges_written_as_strings_are_read_too(tokenizer, tmp_path):
    """So the `tokenizers` library wrote them before version 0.20."""
    tokenizer.save(tmp_path / "tokenizer.json")
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    written["model"]["merges"] = [" ".join(pair) for pair in written["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    again = Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.merges == tokenizer.merges
    assert torch.equal(again(["a red circle"]), tokenizer(["a red circle"]))


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 500; bytes and marks alone take 514"):
        Tokenizer.train(["a"], 500)


def test_features_are_read_at_the_first_end_token():
    config = TextConfig(vocab_size=10, width=8, num_layers=1, num_heads=2, length=6)
    tokens = torch.tensor([[8, 1, 2, 9, 9, 9], [8, 9, 9, 9, 9, 9], [8, 1, 2, 3, 4, 9]])
    context = torch.arange(18.0).reshape(3, 6, 1).expand(3, 6, 8)  # (B, length, width)
    assert TextEncoder(config).pool(tokens, context)[:, 0].tolist() == [3, 7, 17]
