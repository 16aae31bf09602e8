"""Chapter 8, the full pipeline."""

import torch

from ..grading import Exercise

EXERCISES = {}

EXERCISES["8.1"] = Exercise(
    reference=2302,
    tolerance=4.4e-4,  # one step
    mistakes={
        "that is where it has forgotten a share of 1/e of its start; 0.9 takes longer": [
            999.5,
            1000,
        ],
    },
    otherwise="after n steps the average is 1 - 0.999^n",
    also_right=[2301.4],
    also_wrong={"0.999^n": [900, 6905]},
)


def warmed_up(step, decay):
    return min(decay, (1 + step) / (10 + step))


def average_of(old, new, share):
    return share * old + (1 - share) * new


OLD, NEW = torch.tensor([[1.0, 2.0], [3.0, -2.0]])

EXERCISES["8.2"] = Exercise(
    reference=lambda old, new, step, decay: average_of(old, new, warmed_up(step, decay)),
    inputs=[(OLD, NEW, *at) for at in ((0, 0.999), (5, 0.999), (100_000, 0.99), (40, 0.6))],
    mistakes={
        "inverted: the decay is the share of the old average that "
        "stays": lambda old, new, step, decay: average_of(new, old, warmed_up(step, decay)),
        "late, the decay must not grow beyond `decay`": lambda old, new, step, decay: average_of(
            old, new, warmed_up(step, 1)
        ),
        "without the warm-up: early on, the decay must be smaller": [
            lambda old, new, step, decay: average_of(old, new, decay),
            lambda old, new, step, decay: average_of(old, new, max(decay, warmed_up(step, 1))),
        ],
    },
    otherwise="at step {2} with decay {3} it is another average; decay is the smaller of the two",
    also_right=[lambda old, new, step, decay: torch.lerp(new, old, warmed_up(step, decay))],
    also_wrong={"smaller of the two": lambda old, new, step, decay: new},
)

GRADES = [
    {"colour 1": True, "shape 1": True},
    {"colour 1": True, "shape 1": False, "relation": True},
    {"colour 1": True},
    {"shape 1": True, "size 1": True},
]


def prompt_accuracy(grades):
    return sum(all(grade.values()) for grade in grades) / len(grades)


EXERCISES["8.3"] = Exercise(
    reference=prompt_accuracy,
    inputs=[(GRADES,)],
    mistakes={
        "that is the share of attributes; an image counts only if all of its attributes "
        "hold": lambda grades: sum(sum(g.values()) for g in grades) / sum(len(g) for g in grades),
        "that is in per cent; give a number between 0 and 1": lambda g: 100 * prompt_accuracy(g),
    },
    otherwise="here three images of four are entirely right",
    also_right=[lambda grades: torch.tensor([all(g.values()) for g in grades]).float().mean()],
    also_wrong={"three images": lambda grades: sum(any(g.values()) for g in grades) / len(grades)},
)

RANDOM = torch.Generator().manual_seed(2)
TRAINING = 2 * torch.rand(40, 3, 8, 8, generator=RANDOM) - 1
DRAWN = TRAINING[[31, 4, 17]] + 0.3 * torch.randn(3, 3, 8, 8, generator=RANDOM)
TRAINING[7] *= 0.01  # small: nearest to 0, and never the largest product
TRAINING[22] = 3 * TRAINING[31]  # the direction of the first drawn image, and far from it


def distances(drawn, training):
    return torch.cdist(drawn.flatten(1), training.flatten(1))


EXERCISES["8.4"] = Exercise(
    reference=lambda drawn, training: distances(drawn, training).argmin(dim=1),
    inputs=[(DRAWN, TRAINING)],
    form="one row number for each drawn image",
    mistakes={
        "those are the farthest, not the nearest": lambda d, t: distances(d, t).argmax(dim=1),
    },
    otherwise="others are nearer; sum the squared differences over all 3 x H x W numbers",
    also_right=[lambda drawn, t: [(t - x).square().sum(dim=(1, 2, 3)).argmin() for x in drawn]],
    also_wrong={
        "others": lambda drawn, training: (drawn.flatten(1) @ training.flatten(1).T).argmax(dim=1),
        "one row number": distances,
    },
)
