"""Chapter 5, cross-attention."""

import torch
import torch.nn.functional as F

from ..grading import Exercise, Hint

EXERCISES = {}
RANDOM = torch.Generator().manual_seed(3)

EXERCISES["5.1"] = Exercise(
    reference=4096 / 77,
    tolerance=0.01,
    mistakes={
        "inverted: self-attention has the larger matrix": 77 / 4096,
        "64 is a side; count the positions, 64 x 64": 64 / 77,
        "cross-attention has weights too: one for each position and token": 4096,
    },
    otherwise="self-attention has a weight for each pair of positions, cross-attention one for "
    "each position and token",
    also_right=[53.2, 53, torch.tensor(53.19)],
    also_wrong={"each pair": [4096**2, 48]},
)

WORDS = {
    ("a", "b", "a", "b", "c</w>"): 3,
    ("x", "y</w>"): 5,
    ("q", "r", "s</w>"): 1,
    ("q", "r", "t</w>"): 1,
    ("q", "r", "u</w>"): 1,
}
LONG_PIECES = {("ti", "n", "t</w>"): 4, ("n", "t</w>"): 3, ("ti", "p</w>"): 6}


def best_pair(words, once=False):
    count = {}
    for pieces, times in words.items():
        pairs = list(zip(pieces, pieces[1:]))
        for pair in set(pairs) if once else pairs:
            count[pair] = count.get(pair, 0) + times
    return max(count, key=count.get)


def find_pair(answer, words):
    pair = answer(words)
    if isinstance(pair, str) or len(pair) != 2:
        raise Hint(f"that is {pair!r}; give the two pieces of the pair, not what they are glued to")
    return " ".join(pair)


def why_another_pair(got, words):
    if words == LONG_PIECES:
        return "a piece may have several letters: pairs are of neighbouring pieces"
    return f"that is {got!r}; pairs are neighbours within a word, counted over all words"


EXERCISES["5.2"] = Exercise(
    reference=best_pair,
    inputs=[(WORDS,), (LONG_PIECES,)],
    call=find_pair,
    mistakes={
        "a word counts as often as it occurs, not once": lambda w: best_pair(dict.fromkeys(w, 1)),
        "a pair that stands in a word twice counts twice": lambda w: best_pair(w, once=True),
    },
    otherwise=why_another_pair,
    also_right=[lambda words: list(best_pair(words))],
    also_wrong={
        "pieces of the pair": lambda words: "ab",
        "neighbours within": [
            lambda words: ("b", "a"),
            lambda words: best_pair({tuple("".join(w)): n for w, n in words.items()}),
        ],
        "several letters": lambda words: ("a", "b"),
    },
)

B_Q = torch.randn(2, 3, 4, dtype=torch.float64, generator=RANDOM)
B_K, B_V = torch.randn(2, 2, 6, 4, dtype=torch.float64, generator=RANDOM)
KEEP = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 0]], dtype=torch.bool)


def scores(q, k):
    return q @ k.mT / q.shape[-1] ** 0.5


def attend(q, k, v):
    return scores(q, k).softmax(dim=-1) @ v


def attend_to_some(q, k, v, keep):
    return scores(q, k).masked_fill(~keep[:, None], -torch.inf).softmax(dim=-1) @ v


def renormalised(q, k, v, keep):
    shares = scores(q, k).softmax(dim=-1) * keep[:, None]
    return shares / shares.sum(dim=-1, keepdim=True) @ v


def one_at_a_time(q, k, v, keep):
    return torch.stack([attend(q[i], k[i, keep[i]], v[i, keep[i]]) for i in range(2)]).float()


EXERCISES["5.3"] = Exercise(
    reference=attend_to_some,
    inputs=[(B_Q, B_K, B_V, KEEP)],
    mistakes={
        "it sees what it should not, and only that: keep is true where a token may be "
        "seen": lambda q, k, v, keep: attend_to_some(q, k, v, ~keep),
        "the shares that are left do not add up to 1": lambda q, k, v, keep: (
            (scores(q, k).softmax(dim=-1) * keep[:, None]) @ v
        ),
        "a score of 0 still gets a share, for exp(0) is 1; what score gets none?": [
            lambda q, k, v, keep: attend(q, k * keep[..., None], v),
            lambda q, k, v, keep: attend(q, k * keep[..., None], v * keep[..., None]),
        ],
        "the root of d is missing": lambda q, k, v, keep: attend_to_some(2 * q, k, v, keep),
    },
    otherwise="padding gets a score of minus infinity, before the softmax",
    also_right=[
        lambda q, k, v, keep: F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None]),
        one_at_a_time,
        renormalised,
    ],
    also_wrong={
        "minus infinity": lambda q, k, v, keep: attend(q, k, v),
        "shape": lambda q, k, v, keep: attend_to_some(q, k, v, keep)[0],
    },
)

Q = torch.randn(3, 4, dtype=torch.float64, generator=RANDOM)
K, V = torch.randn(2, 20, 4, dtype=torch.float64, generator=RANDOM)


def blocks_of(k, v):
    """Five keys and values at a time, in one memory that all blocks share."""
    memory = torch.empty(2, 5, 4, dtype=torch.float64)
    for block in zip(k.split(5), v.split(5)):
        memory.copy_(torch.stack(block))
        yield memory[0], memory[1]


def attend_in_blocks(q, blocks, subtract=True, shrink=True):
    largest = torch.full((len(q), 1), -torch.inf, dtype=q.dtype)
    total = result = 0.0
    for k, v in blocks:
        before = largest
        largest = torch.maximum(largest, scores(q, k).amax(dim=1, keepdim=True))
        if not subtract:
            before = largest = torch.zeros_like(largest)
        factor = (before - largest).exp() if shrink else 1.0
        powers = (scores(q, k) - largest).exp()
        total = factor * total + powers.sum(dim=1, keepdim=True)
        result = factor * result + powers @ v
    return result / total


def attend_to_kept(q, blocks):
    keys, values = zip(*blocks)
    return attend(q, torch.cat(keys), torch.cat(values))


def why_blocks_differ(got, q, k, v):
    if k.abs().max() < 100:
        return (
            "keep three things for each query: the largest score, the sum of the powers, the "
            "weighted sum of the values"
        )
    if got.isfinite().all():
        return "with large scores the result is another"
    return (
        "right while scores are small; with large ones exp overflows: subtract the largest score "
        "so far"
    )


EXERCISES["5.4"] = Exercise(
    reference=attend_in_blocks,
    inputs=[(Q, K, V), (Q, 1000 * K, V)],
    call=lambda answer, q, k, v: answer(q, blocks_of(k, v)),
    mistakes={
        "that is the last block alone: its memory is used again, so take what you need before the "
        "next comes": attend_to_kept,
        "the blocks do not count alike: keep sums of powers, and divide once at the end": [
            lambda q, blocks: torch.stack([attend(q, *block) for block in blocks]).mean(dim=0),
            lambda q, blocks: torch.stack([attend(q, *block) for block in blocks]).sum(dim=0),
        ],
        "when a block brings a larger score, both sums so far must shrink to the new "
        "one": lambda q, blocks: attend_in_blocks(q, blocks, shrink=False),
    },
    otherwise=why_blocks_differ,
    also_right=[lambda q, blocks: attend_to_kept(q, [(k.clone(), v.clone()) for k, v in blocks])],
    also_wrong={
        "overflows": lambda q, blocks: attend_in_blocks(q, blocks, subtract=False),
        "large scores": lambda q, blocks: attend_in_blocks(
            q, [(k.clamp(-9, 9), v.clone()) for k, v in blocks]
        ),
        "keep three": [
            lambda q, blocks: [next(blocks), q][1],
            lambda q, blocks: attend_in_blocks(2 * q, blocks),
        ],
    },
)
