"""Drawn diagrams: the map of the whole pipeline, and the parts of which it is made."""

from __future__ import annotations

import torch
from torch import Tensor

from .drawing import Drawing
from .loading import result

# Which parts of the map each chapter is about.
LIT = {
    0: {"autoencoder", "scale", "noise", "unet", "loss", "text", "guidance", "sampler", "draw"},
    1: {"noise"},
    2: {"noise", "unet", "loss", "DDPM sampler"},
    3: {"autoencoder"},
    4: {"scale"},
    5: {"text", "unet"},
    6: {"guidance", "text"},
    7: {"sampler"},
    8: {"autoencoder", "scale", "noise", "unet", "loss", "text", "guidance", "sampler", "draw"},
    9: {"autoencoder", "unet", "sampler"},
    10: {"autoencoder", "scale", "unet", "text", "guidance", "sampler", "draw"},
}


def latent_image(z: Tensor, limit: float = 3.0) -> Tensor:
    """The four channels of a latent (4, h, w), 2 x 2, as an image (3, 2h + 1, 2w + 1) in [-1, 1].

    Orange is positive, blue negative, white zero; at `limit` and beyond the colour is full. A
    latent shown so cannot be taken for a small picture.
    """
    channels, height, width = z.shape
    share = (z / limit).clamp(-1, 1)
    orange, blue = torch.tensor([0.70, -0.22, -1.0]), torch.tensor([-1.0, -0.11, 0.40])
    colours = torch.where(share.unsqueeze(1) > 0, orange.view(1, 3, 1, 1), blue.view(1, 3, 1, 1))
    tiles = 1 + share.abs().unsqueeze(1) * (colours - 1)  # (4, 3, h, w); 1 is white
    image = torch.full((3, 2 * height + 1, 2 * width + 1), 0.3)
    for i in range(channels):
        top, left = (i // 2) * (height + 1), (i % 2) * (width + 1)
        image[:, top : top + height, left : left + width] = tiles[i]
    return image


class _Map:
    """The drawing of `pipeline`, part by part; what is not in `lit` is faint."""

    def __init__(self, lit: set[str]):
        found = result("00/map")
        self.images = found["pictures"]  # an image, the same restored, and one drawn
        self.latents = {}
        for name, values in found["latents"].items():
            self.latents[name] = latent_image(torch.tensor(values).view(4, 8, 8))
        self.lit = lit
        self.drawing = Drawing(864, 560)

    def faint(self, part: str) -> bool:
        return part not in self.lit

    def badge(self, x: float, y: float, number: int, part: str) -> None:
        self.drawing.circle(x, y, 11, str(number), "badge", faint=self.faint(part))

    def squeeze(self) -> None:
        """Stage 1: an image, squeezed and restored."""
        drawing, faint, badge = self.drawing, self.faint, self.badge
        latents = self.latents
        x, x_hat, _ = self.images
        y = 90
        part = "autoencoder"
        drawing.words(20, 22, "Stage 1: squeeze and restore", anchor="start", kind="bold")
        for x_position, image, name in ((60, x, "image x"), (640, x_hat, "restored x̂")):
            drawing.image(x_position, y, 72, image, faint=faint(part))
            drawing.words(x_position, y + 50, name, faint=faint(part))
        drawing.image(350, y, 72, latents["z"], faint=faint(part) and faint("scale"))
        drawing.words(350, y + 50, "latent z", faint=faint(part) and faint("scale"))
        drawing.box(205, y, 110, 56, "encoder E", "network", faint=faint(part))
        drawing.box(495, y, 110, 56, "decoder D", "network", faint=faint(part))
        drawing.box(775, y, 140, 84, "L_1\nperceptual\nadversarial\nKL", "loss", faint=faint(part))
        for start, end in ((98, 148), (262, 312), (388, 438), (552, 602), (678, 703)):
            drawing.arrow([(start, y), (end, y)], faint=faint(part))
        badge(205, y - 42, 3, part)

    def predict_noise(self) -> None:
        """Stage 2: the U-Net learns to predict the noise."""
        drawing, faint, badge = self.drawing, self.faint, self.badge
        latents = self.latents
        y = 265
        drawing.words(20, 188, "Stage 2: learn to predict the noise", anchor="start", kind="bold")
        drawing.arrow([(350, 148), (350, 170), (420, 170)], head=False, faint=faint("scale"))
        drawing.arrow([(420, 170), (420, 205), (60, 205), (60, y - 40)], faint=faint("scale"))
        drawing.words(432, 170, "times the scale factor", anchor="start", faint=faint("scale"))
        badge(616, 170, 4, "scale")
        drawing.image(60, y, 72, latents["z"], faint=faint("noise") and faint("scale"))
        drawing.words(60, y + 50, "scaled latent", faint=faint("noise") and faint("scale"))
        drawing.words(115, y, "+", faint=faint("noise"))
        drawing.image(170, y, 72, latents["eps"], faint=faint("noise"))
        drawing.words(170, y + 50, "noise ε", faint=faint("noise"))
        drawing.arrow([(208, y), (258, y)], faint=faint("noise"))
        badge(233, y - 22, 1, "noise")
        drawing.image(296, y, 72, latents["z_t"], faint=faint("noise"))
        drawing.words(296, y + 50, "noised z_t", faint=faint("noise"))
        drawing.arrow([(334, y), (432, y)], faint=faint("unet"))
        drawing.box(495, y, 120, 56, "U-Net", "network", faint=faint("unet"))
        badge(495, y - 42, 2, "unet")
        drawing.arrow([(556, y), (602, y)], faint=faint("unet"))
        drawing.image(640, y, 72, latents["eps_hat"], faint=faint("unet"))
        drawing.words(640, y + 50, "prediction ε̂", faint=faint("unet"))
        drawing.arrow([(678, y), (703, y)], faint=faint("loss"))
        drawing.box(775, y, 140, 56, "||ε - ε̂||^2", "loss", faint=faint("loss"))

    def read_caption(self) -> None:
        """The caption reaches the U-Net in training and in drawing."""
        drawing, faint, badge = self.drawing, self.faint, self.badge
        drawing.box(310, 362, 190, 40, "caption or prompt y", "data", faint=faint("text"))
        drawing.arrow([(406, 362), (432, 362)], faint=faint("text"))
        drawing.box(495, 362, 120, 40, "text encoder", "text", faint=faint("text"))
        drawing.arrow([(495, 341), (495, 295)], faint=faint("text"))
        drawing.arrow([(495, 383), (495, 441)], faint=faint("text"))
        drawing.words(482, 318, "cross-attention", anchor="end", faint=faint("text"))
        badge(516, 318, 5, "text")
        drawing.words(516, 412, "guidance", anchor="start", faint=faint("guidance"))
        badge(600, 412, 6, "guidance")

    def draw(self) -> None:
        """From pure noise to an image."""
        drawing, faint, badge = self.drawing, self.faint, self.badge
        latents = self.latents
        y = 470
        drawing.words(20, 402, "Draw", anchor="start", kind="bold")
        slow = "DDPM sampler" in self.lit  # in chapter 2, before DDIM is known
        sampler = "DDPM sampler" if slow else "sampler"
        steps = "1,000 steps" if slow else "50 steps"
        parts = {sampler, "draw"} & self.lit
        drawing.image(60, y, 72, latents["z_T"], faint=not parts)
        drawing.words(60, y + 50, "pure noise z_T", faint=not parts)
        drawing.arrow([(98, y), (432, y)], faint=faint(sampler))
        drawing.box(495, y, 120, 56, f"U-Net,\n{steps}", "network", faint=faint(sampler))
        drawing.arrow([(495, 499), (495, 530), (330, 530), (330, y + 4)], faint=faint(sampler))
        if slow:
            drawing.words(318, 500, "DDPM step", anchor="end")
            badge(222, 500, 2, sampler)
        height = 529 if slow else 512
        drawing.words(318, height, "DDIM step", anchor="end", faint=faint("sampler"))
        badge(225, height, 7, "sampler")
        drawing.arrow([(556, y), (592, y)], faint=faint(sampler))
        drawing.image(630, y, 72, latents["z_0"], faint=not parts)
        drawing.words(630, y + 50, "scaled latent z_0", faint=not parts)
        drawing.words(684, y - 48, "÷ scale factor", faint=faint("scale"))
        drawing.arrow([(668, y), (690, y)], faint=faint("draw"))
        drawing.box(727, y, 72, 56, "D,\nonce", "network", faint=faint("draw"))
        drawing.arrow([(764, y), (782, y)], faint=faint("draw"))
        drawing.image(821, y, 72, self.images[2], faint=faint("draw"))
        drawing.words(821, y + 50, "image", faint=faint("draw"))


def pipeline(chapter: int = 0) -> None:
    """The map of latent diffusion: two trainings, and drawing. `chapter`'s part is lit."""
    lit = LIT[chapter]
    times = "a thousand times" if "DDPM sampler" in lit else "fifty times"
    parts = _Map(lit)
    parts.squeeze()
    parts.predict_noise()
    parts.read_caption()
    parts.draw()
    parts.drawing.show(
        "Map of latent diffusion in three rows. Stage 1: an image passes the encoder, becomes a "
        "small latent, and the decoder restores it; four losses compare. Stage 2: the scaled "
        "latent plus noise passes the U-Net, which predicts the noise; the text encoder tells it "
        f"the caption. Draw: pure noise passes the U-Net {times}, is divided by the scale "
        "factor, and passes the decoder once. "
        + ("All parts are lit." if len(lit) > 6 else f"Lit: {', '.join(sorted(lit))}.")
    )


# ---- parts -------------------------------------------------------------------------------------


def residual_block(
    channels: int = 64,
    side: int = 8,
    t_width: int = 256,
    shortcut: str = "shortcut: the block only adds a change (1x1 conv where the channels differ)",
) -> None:
    """A residual block of the U-Net, with the time embedding; by default in size `shapes`."""
    drawing = Drawing(864, 250)
    y = 90
    drawing.words(52, y, f"h\n({channels}, {side}, {side})")
    drawing.arrow([(96, y), (132, y)])
    drawing.box(200, y, 132, 60, "GroupNorm\nSiLU", "data")
    drawing.arrow([(268, y), (290, y)])
    drawing.box(342, y, 100, 60, "conv 3x3", "network")
    drawing.arrow([(394, y), (420, y)])
    drawing.circle(436, y, 15, "+", "data")
    drawing.arrow([(452, y), (478, y)])
    drawing.box(546, y, 132, 60, "GroupNorm\nSiLU", "data")
    drawing.arrow([(614, y), (636, y)])
    drawing.box(688, y, 100, 60, "conv 3x3", "network")
    drawing.arrow([(740, y), (764, y)])
    drawing.circle(780, y, 15, "+", "data")
    drawing.arrow([(796, y), (824, y)])
    drawing.words(842, y, "h'")
    drawing.arrow([(112, y), (112, 26), (780, 26), (780, y - 17)])
    drawing.words(446, 14, shortcut)
    y = 205
    drawing.words(60, y, "t = 300")
    drawing.arrow([(96, y), (122, y)])
    drawing.box(200, y, 148, 50, "waves of t,\nslow and fast", "data")
    drawing.arrow([(276, y), (312, y)])
    drawing.words(350, y, f"t_{{emb}}\n({t_width})")
    drawing.arrow([(386, y), (404, y)])
    drawing.box(456, y, 96, 50, "linear", "network")
    drawing.arrow([(436, 178), (436, 107)])
    drawing.words(
        524,
        y,
        f"{channels} numbers: one for each channel,\nthe same at every position",
        anchor="start",
    )
    drawing.show(
        "A residual block. The upper path: GroupNorm and SiLU, a 3 by 3 convolution, plus, "
        "GroupNorm and SiLU, a second convolution, and a plus where the shortcut adds "
        "the input. Below, the timestep becomes sines and cosines, the time embedding, and a "
        "linear layer adds one number to each channel at the first plus."
    )


def pixel_unet() -> None:
    """The U-Net of chapter 2, on pixels: its Blocks, and the shapes between them."""
    drawing = Drawing(864, 446)

    def block(x: float, y: float, maps: str, t_x: float) -> None:
        drawing.box(x, y, 110, 54, f"Block\n{maps}", "network")
        drawing.words(t_x, y - 60, "t")
        drawing.arrow([(t_x, y - 50), (t_x, y - 28)])

    # the shape of the skip, the same halved, and the maps into and out of both Blocks
    levels = [
        ("(32, 32, 32)", "(32, 16, 16)", "32 → 32", "64 → 32"),
        ("(64, 16, 16)", "(64, 8, 8)", "32 → 64", "128 → 32"),
        ("(128, 8, 8)", "(128, 4, 4)", "64 → 128", "256 → 64"),
    ]
    low = 404
    for i, (shape, halved, down, up) in enumerate(levels):
        y, left, right = 84 + 110 * i, 190 + 50 * i, 674 - 50 * i
        block(left, y, down, left + 30)
        block(right, y, up, right - 30)
        drawing.arrow([(left + 56, y), (right - 57, y)], dashed=True)
        drawing.words(432, y - 15, f"skip {shape}")
        last = i == 2
        drawing.arrow([(left - 5, y + 28), (375, low - 12) if last else (left + 30, y + 82)])
        drawing.arrow([(489, low - 12) if last else (right - 30, y + 82), (right + 5, y + 28)])
        side = 34 if last else -3
        middle = y + (68 if last else 56)
        drawing.words(left + side, middle, f"halve: {halved}", anchor="end")
        drawing.words(right - side, middle, f"double: {shape}", anchor="start")
    block(432, low, "128 → 128", 432)
    drawing.words(46, 84, "x_t\n(3, 32, 32)")
    drawing.arrow([(92, 84), (133, 84)])
    drawing.words(112, 66, "conv")
    drawing.arrow([(731, 84), (772, 84)])
    drawing.words(753, 66, "conv")
    drawing.words(818, 84, "ε̂\n(3, 32, 32)")
    drawing.show(
        "The U-Net of this chapter. An image of 3 by 32 by 32 passes three blocks on the way down, "
        "at sides of 32, 16 and 8 with 32, 64 and 128 maps, a middle block at side 4 with 128 "
        "maps, and three blocks on the way up. There the doubled maps and the maps of the dashed "
        "skip go in together: 256, 128 and 64; and 64, 32 and 32 come out. A small arrow shows "
        "that t enters every block."
    )


def unet() -> None:
    """The U-Net of size `shapes`: its levels, shapes and skips."""
    drawing = Drawing(864, 380)
    top, bottom = 100, 250
    drawing.words(30, top - 68, "z_t\n(4, 8, 8)")
    drawing.arrow([(30, top - 46), (30, top), (50, top)])
    down = [(90, "conv\nin"), (205, "ResBlock,\nattention")]
    up = [(545, "ResBlock,\nattention"), (670, "ResBlock,\nattention"), (790, "norm,\nconv out")]
    for x, text in down + up:
        drawing.box(x, top, 104 if "Res" in text else 76, 56, text, "network")
    drawing.arrow([(128, top), (152, top)])
    drawing.arrow([(258, top), (488, top)], dashed=True)
    drawing.words(372, top - 18, "skip: 64 + 64 channels")
    drawing.arrow([(598, top), (616, top)])
    drawing.arrow([(723, top), (750, top)])
    drawing.arrow([(96, top - 28), (96, 46), (670, 46), (670, top - 30)], dashed=True)
    drawing.arrow([(790, top - 28), (790, top - 48)])
    drawing.words(790, top - 62, "ε̂ (4, 8, 8)")
    drawing.words(205, top + 44, "(64, 8, 8)")
    drawing.words(610, top + 44, "(64, 8, 8)")
    drawing.arrow([(205, top + 58), (205, bottom - 30)])
    drawing.words(218, top + 88, "down: conv, stride 2", anchor="start")
    drawing.box(205, bottom, 104, 56, "ResBlock,\nattention", "network")
    drawing.arrow([(258, bottom), (312, bottom)])
    drawing.box(375, bottom, 124, 72, "middle:\nRes, attention,\nRes", "network")
    drawing.arrow([(438, bottom), (488, bottom)])
    drawing.box(545, bottom, 112, 56, "ResBlock x 2,\nattention", "network")
    drawing.arrow([(205, bottom + 28), (205, 318), (545, 318), (545, bottom + 30)], dashed=True)
    drawing.words(375, 334, "skips of this level: (64, 4, 4)")
    drawing.arrow([(545, bottom - 28), (545, top + 30)])
    drawing.words(558, top + 88, "up: nearest, conv", anchor="start")
    drawing.box(770, bottom, 172, 44, "t: into each ResBlock", "data")
    drawing.box(770, bottom + 58, 172, 44, "y: into each attention", "text")
    drawing.words(90, bottom, "(64, 4, 4)")
    drawing.show(
        "The U-Net of size shapes. A latent of 4 channels, 8 by 8, goes down from 8 by 8 to 4 "
        "by 4 positions with 64 channels, through the middle, and up again to a prediction of "
        "the same shape as the latent. Dashed skips join each level's features on the way down "
        "to those on the way up. The time enters every residual block, the caption every "
        "attention."
    )


def autoencoder() -> None:
    """The autoencoder with its four losses."""
    found = result("00/map")
    x, x_hat, _ = found["pictures"]
    z = latent_image(torch.tensor(found["latents"]["z"]).view(4, 8, 8))
    drawing = Drawing(864, 380)
    y = 150
    drawing.image(60, y, 88, x)
    drawing.words(60, y + 62, "x (3, 32, 32)")
    drawing.arrow([(106, y), (140, y)])
    drawing.box(196, y, 104, 60, "encoder E", "network")
    drawing.arrow([(250, y), (282, y)])
    drawing.box(340, y, 108, 60, "mean μ,\nvariance σ^2", "data")
    drawing.arrow([(396, y), (424, y)])
    drawing.image(470, y, 88, z)
    drawing.words(470, y + 62, "z (4, 8, 8)")
    drawing.arrow([(516, y), (550, y)])
    drawing.box(606, y, 104, 60, "decoder D", "network")
    drawing.arrow([(660, y), (700, y)])
    drawing.image(746, y, 88, x_hat)
    drawing.words(746, y + 62, "x̂ (3, 32, 32)")
    drawing.words(470, y - 60, "z = μ + σ ε")
    drawing.box(340, 34, 190, 44, "KL: near N(0, 1)", "loss")
    drawing.arrow([(340, 120), (340, 58)])
    low = 330
    drawing.box(130, low, 150, 62, "L_1: pixels\nof x and x̂", "loss")
    drawing.box(440, low, 170, 62, "perceptual: features\nof x and x̂", "loss")
    drawing.box(746, low, 170, 62, "adversarial: does x̂\nlook real?", "loss")
    drawing.arrow([(60, y + 76), (60, 254), (720, 254), (720, y + 76)], head=False)
    drawing.arrow([(746, y + 76), (746, low - 34)])
    drawing.arrow([(440, 254), (440, low - 34)])
    drawing.arrow([(130, 254), (130, low - 34)])
    drawing.show(
        "The autoencoder. The encoder turns an image of 3 by 32 by 32 numbers into a mean and a "
        "variance, from which a latent of 4 by 8 by 8 numbers is drawn; the decoder "
        "restores the image. Four losses: the L1 distance of the pixels, the perceptual "
        "distance of features, the adversarial loss of a discriminator on the restored image, "
        "and the KL divergence that keeps the posterior near a standard Gaussian."
    )


def reparameterisation() -> None:
    """Where the gradient can flow: sampling z directly, and as mean plus scaled noise."""
    drawing = Drawing(864, 230)
    for x, title in ((215, "z drawn from N(μ, σ^2)"), (645, "z = μ + σ ε")):
        drawing.words(x, 22, title, kind="bold")
    drawing.box(80, 90, 92, 48, "μ, σ", "data")
    drawing.circle(215, 90, 34, "draw", "loss")
    drawing.box(350, 90, 92, 48, "z", "data")
    drawing.arrow([(127, 90), (180, 90)])
    drawing.arrow([(250, 90), (303, 90)])
    drawing.arrow([(350, 116), (350, 176), (250, 176)], dashed=True)
    drawing.words(215, 176, "stops", kind="bold")
    drawing.words(215, 208, "a draw has no derivative")
    drawing.box(510, 90, 92, 48, "μ, σ", "data")
    drawing.circle(645, 90, 34, "μ + σ ε", "network")
    drawing.box(780, 90, 92, 48, "z", "data")
    drawing.arrow([(557, 90), (610, 90)])
    drawing.arrow([(680, 90), (733, 90)])
    drawing.words(700, 48, "ε from outside", anchor="start")
    drawing.arrow([(694, 48), (672, 64)])
    drawing.arrow([(780, 116), (780, 176), (510, 176), (510, 118)], dashed=True)
    drawing.words(645, 208, "the gradient (dashed) reaches μ and σ")
    drawing.show(
        "Two ways to get z. Left: mu and sigma go into a random draw, and the gradient coming "
        "back from z stops there. Right: z is mu plus sigma times outside noise, and the "
        "gradient passes through to mu and sigma."
    )


def cross_attention() -> None:
    """Cross-attention: one position of the latent reads the words of the caption."""
    words = ["a", "red", "circle", "above", "a", "blue", "square"]
    weights = [0.02, 0.44, 0.36, 0.06, 0.02, 0.05, 0.05]  # made up, as an example
    drawing = Drawing(864, 350)
    drawing.words(110, 24, "words y", kind="bold")
    drawing.words(430, 24, "weights a_{ij} = softmax(q_i k_j / √d)", kind="bold")
    drawing.words(735, 24, "positions of the latent", kind="bold")
    query = (640.0, 150.0)
    for j, (word, weight) in enumerate(zip(words, weights, strict=True)):
        y = 62 + 38 * j
        drawing.box(70, y, 96, 30, word, "text")
        drawing.arrow([(119, y), (142, y)])
        drawing.words(180, y, f"k_{j + 1}, v_{j + 1}")
        drawing.words(258, y, f"{100 * weight:.0f} %", anchor="end")
        drawing.line((268, y), query, 1 + 14 * weight)
    drawing.circle(*query, 17, "q_i", "network")
    drawing.arrow([(658, 148), (690, 143)], head=False)
    for row in range(8):
        for column in range(8):
            lit = (row, column) == (3, 1)
            x, y = 675 + 17 * column, 90 + 17 * row
            drawing.box(x, y, 16, 16, kind="loss" if lit else "data", corner=2)
    drawing.words(735, 250, "64 positions, a query q_i each")
    drawing.words(735, 290, "reads: Σ_j a_{ij} v_j")
    drawing.words(430, 334, "Thick lines: this position reads mostly from red and circle.")
    drawing.show(
        "Cross-attention. Left, seven words of a caption, each with a key and a value. Right, "
        "the 8 by 8 positions of the latent; one of them, with its query, is lit. Lines from "
        "the words to this position are as thick as the attention weights: thick for red and "
        "circle, thin for the rest. The position receives the values, averaged by these "
        "weights."
    )


def guidance() -> None:
    """Classifier-free guidance as arrows: from the prediction for no caption through that for y."""
    drawing = Drawing(864, 270)
    start, empty, told = (110.0, 215.0), (330.0, 165.0), (410.0, 115.0)
    guided = tuple(e + 3 * (y - e) for e, y in zip(empty, told, strict=True))
    drawing.circle(*start, 6, kind="badge")
    drawing.words(start[0], start[1] + 28, "z_t")
    drawing.arrow([start, empty])
    drawing.arrow([start, told])
    drawing.arrow([empty, guided], dashed=True)
    drawing.circle(*empty, 6, kind="loss")
    drawing.circle(*told, 6, kind="network")
    drawing.circle(*guided, 6, kind="text")
    drawing.words(empty[0] + 14, empty[1] + 18, "ε(z_t, ∅): no caption, w = 0", anchor="start")
    drawing.words(told[0] - 12, told[1] - 20, "ε(z_t, y): the caption, w = 1", anchor="end")
    drawing.words(guided[0] - 14, guided[1] - 2, "w = 3", anchor="end")
    drawing.words(
        470, 232, "ε̂ = ε(z_t, ∅) + w (ε(z_t, y) - ε(z_t, ∅))", anchor="start", kind="bold"
    )
    drawing.show(
        "Guidance as arrows. From the latent one arrow leads to the prediction without a "
        "caption and one to the prediction with it. A dashed line runs from the first through "
        "the second and goes on: guidance of 3 is three times as far."
    )


def ddim_step() -> None:
    """One DDIM step: remove all the predicted noise, then put less of the same noise back."""
    drawing = Drawing(864, 230)
    y = 120
    drawing.box(100, y, 150, 56, "z_t\nmuch noise", "data")
    drawing.box(432, y, 226, 56, "ẑ_0\nall predicted noise removed", "network")
    drawing.box(764, y, 150, 56, "z_s, s < t\nless noise", "data")
    drawing.arrow([(176, y), (317, y)])
    drawing.words(246, y - 20, "- √(1 - α̅_t) ε̂")
    drawing.words(246, y + 20, "/ √α̅_t")
    drawing.arrow([(546, y), (688, y)])
    drawing.words(617, y - 20, "x √α̅_s")
    drawing.words(617, y + 20, "+ √(1 - α̅_s) ε̂")
    drawing.arrow([(764, y + 30), (764, 200), (100, 200), (100, y + 32)], dashed=True)
    drawing.words(432, 186, "again, 50 times")
    drawing.words(432, 40, "one prediction ε̂ of the U-Net serves both")
    drawing.show(
        "One DDIM step. From the latent at t the predicted noise is removed, which gives an "
        "estimate of the clean latent; then the same noise, but less of it, is added, which "
        "gives the latent at the earlier time s. This repeats fifty times."
    )
