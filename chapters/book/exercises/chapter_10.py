"""Chapter 10, this is Stable Diffusion."""

import torch

from ldm_minimal import TransformerBlock

from ..grading import Exercise, Hint

EXERCISES = {}
TEXT, UNET, DECODER = 13.2985, 803.2734, 2514.5189  # GFLOP

EXERCISES["10.1"] = Exercise(
    reference=DECODER / (TEXT + 4 * UNET + DECODER),
    tolerance=0.01,
    mistakes={
        "that is in per cent; give a number between 0 and 1": 43.75,
        "that is the U-Net's share": 0.56,
        "without guidance each of the four steps asks the U-Net once": 0.28,
    },
    otherwise="the decoder's FLOPs over those of one text encoding, four evaluations, one decode",
    also_right=[0.4375, 0.44],
    also_wrong={"over those": [0.75, 0.03]},
)


def attention_flops(n, m, width, context_width, heads, queries=2, products=2):
    """Exercise 10.2, right or with one mistake: the projections of n, the products of n and m."""
    keys_and_values = 2 * 2 * m * context_width * width
    return queries * 2 * n * width**2 + keys_and_values + products * 2 * n * m * width


def head_by_head(n, m, width, context_width, heads):
    projections = 4 * n * width**2 + 4 * m * context_width * width
    return torch.tensor(float(projections + heads * 4 * n * m * (width // heads)))


EXERCISES["10.2"] = Exercise(
    reference=attention_flops,
    inputs=[(50, 77, 48, 20, 6), (4096, 77, 320, 768, 8), (64, 64, 96, 96, 3)],
    mistakes={
        "a multiplication and its addition are two FLOP, not one": lambda *n: (
            attention_flops(*n) / 2
        ),
        "each head works on width / heads numbers, so all of them together cost as much as one of "
        "the whole width": lambda *sizes: attention_flops(*sizes, products=2 * sizes[-1]),
        "there are two products with m: keys and values, and scores and the weighted sum": [
            lambda *sizes: attention_flops(*sizes, products=1),
            lambda n, m, width, context, heads: attention_flops(n, m, width, context / 2, heads),
        ],
        "queries are projected, and so is the result": lambda *n: attention_flops(*n, queries=1),
        "that is the attention alone; queries, keys, values and the result are "
        "projections": lambda n, m, width, context, heads: 4 * n * m * width,
        "keys and values are made of the m vectors of the context, not of the n "
        "positions": lambda n, m, c, d, heads: attention_flops(n, m, c, d * n / m, heads),
    },
    otherwise="for n = {0}, m = {1}, width {2}, context {3} it is {right:,.0f}: two projections "
    "of n, two of m, scores, weighted sum",
    also_right=[head_by_head],
    also_wrong={"two projections of n": lambda n, m, width, context, heads: n * m},
)

BLOCKS = [
    (way, level, number, per_level)
    for per_level in (2, 1, 3)
    for way, more in (("down", 0), ("up", 1))
    for level in range(4)
    for number in range(per_level + more)
]


def block_number(first=1, halving=1, more=1, first_up=0, reverse=False):
    """Exercise 10.3, right or with one mistake."""

    def number_of(way, level, number, blocks):
        if way == "down":
            return first + level * (blocks + halving) + number
        return first_up + (3 - level if reverse else level) * (blocks + more) + number

    return number_of


def which_block_is_wrong(got, blocks):
    for found, (way, level, number, per_level) in zip(got, blocks):
        right = block_number()(way, level, number, per_level)
        if found != right:
            side = "input" if way == "down" else "output"
            return (
                f"{way}_blocks.{level}.resnets.{number} with {per_level} blocks a level is "
                f"{side}_blocks.{right}.0, not {found:g}"
            )


EXERCISES["10.3"] = Exercise(
    reference=block_number(),
    inputs=[(BLOCKS,)],
    call=lambda answer, blocks: [answer(*block) for block in blocks],
    mistakes={
        "input_blocks.0 is the first convolution, so the numbers going down are one "
        "higher": block_number(first=0),
        "going down, each halving has a number of its own": block_number(halving=0),
        "going up, a level has one residual block more": block_number(more=0),
        "output_blocks begin at 0: no convolution comes before them": block_number(first_up=1),
        "going up, both count in the order in which the blocks run": block_number(reverse=True),
    },
    otherwise=which_block_is_wrong,
    also_right=[lambda way, level, i, blocks: level * (blocks + 1) + i + (way == "down")],
    also_wrong={"not 7": lambda *block: 7},
)

INSIDE = "transformer_blocks.0"
NAMES = {  # ours: diffusers'; two names on one side are the two halves of one tensor on the other
    "norm": "norm",
    "proj_in": "proj_in",
    "norm_self": f"{INSIDE}.norm1",
    "self_attn.to_q": f"{INSIDE}.attn1.to_q",
    "self_attn.to_kv": f"{INSIDE}.attn1.to_k {INSIDE}.attn1.to_v",
    "self_attn.to_out": f"{INSIDE}.attn1.to_out.0",
    "norm_cross": f"{INSIDE}.norm2",
    "cross_attn.to_q": f"{INSIDE}.attn2.to_q",
    "cross_attn.to_kv": f"{INSIDE}.attn2.to_k {INSIDE}.attn2.to_v",
    "cross_attn.to_out": f"{INSIDE}.attn2.to_out.0",
    "norm_mlp": f"{INSIDE}.norm3",
    "mlp_value mlp_gate": f"{INSIDE}.ff.net.0.proj",
    "mlp_out": f"{INSIDE}.ff.net.2",
    "proj_out": "proj_out",
}


def random_block(seed):
    block = TransformerBlock(16, 12, num_heads=2, num_groups=4)
    random = torch.Generator().manual_seed(seed)
    for parameter in block.parameters():
        parameter.data.normal_(generator=random)
    return block


def keys(names, kind):
    return [f"{name}.{kind}" for name in names.split()]


def renamed(tensors, names):
    """The tensors under new names; `names` are pairs (old, new)."""
    result = {}
    for old, new in names:
        for kind in ("weight", "bias"):
            parts = [tensors[key] for key in keys(old, kind) if key in tensors]
            if parts:  # queries, keys and values have no bias
                result.update(zip(keys(new, kind), torch.cat(parts).chunk(len(new.split()))))
    return result


def in_diffusers_names(block):
    theirs = renamed(block.state_dict(), NAMES.items())
    for name in ("proj_in.weight", "proj_out.weight"):
        theirs[name] = theirs[name][:, :, None, None]  # a 1x1 convolution
    return {name: tensor.clone() for name, tensor in theirs.items()}


def load_with(changes=None):
    """Exercise 10.4, right or with changed names."""
    names = {**NAMES, **(changes or {})}

    def load_block(block, theirs):
        ours = renamed(theirs, [(theirs_name, our_name) for our_name, theirs_name in names.items()])
        for name in ("proj_in.weight", "proj_out.weight"):
            ours[name] = ours[name].flatten(1)
        block.load_state_dict(ours, strict=False)

    return load_block


def load_new_tensors(block, theirs):
    loaded = random_block(seed=0)
    load_with()(loaded, theirs)
    block.load_state_dict(loaded.state_dict(), assign=True)


def copy_in_place(block, theirs):
    loaded = random_block(seed=0)
    load_with()(loaded, theirs)
    for ours, new in zip(block.parameters(), loaded.parameters()):
        ours.copy_(new)


def load_convolution(block, theirs):
    block.proj_in.weight.data = theirs["proj_in.weight"]


@torch.no_grad()
def loaded_numbers(answer):
    """All numbers of a block into which `answer` has loaded another one, in one row."""
    block = random_block(seed=4)
    shapes = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
    answer(block, in_diffusers_names(random_block(seed=3)))
    loaded = dict(block.named_parameters())
    for name, shape in shapes.items():
        if tuple(loaded[name].shape) != shape:
            raise Hint(f"{name} has shape {tuple(loaded[name].shape)}; it must stay {shape}")
    return torch.cat([loaded[name].flatten() for name in shapes])


def which_tensors_differ(got):
    right = dict(random_block(seed=3).named_parameters())
    pieces = got.split([parameter.numel() for parameter in right.values()])
    wrong = [
        name
        for (name, parameter), piece in zip(right.items(), pieces)
        if not torch.allclose(piece, parameter.flatten().double(), rtol=1e-4)
    ]
    return f"{len(wrong)} of {len(right)} tensors are others: {', '.join(wrong[:3])}"


EXERCISES["10.4"] = Exercise(
    reference=load_with(),
    call=loaded_numbers,
    mistakes={
        "value and gate are exchanged: the value stands above, the gate below": load_with(
            {"mlp_gate mlp_value": f"{INSIDE}.ff.net.0.proj"}
        ),
        "self-attention's keys and values are exchanged: keys above values": load_with(
            {"self_attn.to_kv": f"{INSIDE}.attn1.to_v {INSIDE}.attn1.to_k"}
        ),
        "cross-attention's keys and values are exchanged: keys above values": load_with(
            {"cross_attn.to_kv": f"{INSIDE}.attn2.to_v {INSIDE}.attn2.to_k"}
        ),
    },
    otherwise=which_tensors_differ,
    also_right=[load_new_tensors, copy_in_place],
    also_wrong={
        "tensors are others: norm_cross.weight, norm_cross.bias": load_with({"norm_cross": ""}),
        "of 2": lambda block, theirs: None,
        "must stay": load_convolution,
    },
)
