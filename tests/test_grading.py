"""check() and its tables: right answers pass, each mistake gets its own hint, nothing crashes."""

import re
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import ROOT

sys.path.insert(0, str(ROOT / "chapters"))
from book import check
from book.exercises import EXERCISES
from book.exercises.chapter_10 import in_diffusers_names, random_block
from book.grading import pairs, result_of

RIGHT = [
    (number, answer)
    for number, exercise in EXERCISES.items()
    for answer in (exercise.reference, *exercise.also_right)
]
MISTAKES = [
    (number, mistake, hint)
    for number, exercise in EXERCISES.items()
    for mistake, hint in pairs(exercise.mistakes)
]
WRONG = [
    (number, answer, words)
    for number, exercise in EXERCISES.items()
    for answer, words in pairs(exercise.also_wrong)
]
FUNCTIONS = [number for number, exercise in EXERCISES.items() if callable(exercise.reference)]


@pytest.fixture
def said(capsys):
    """What check() prints of an answer, without "exercise NUMBER: "."""

    def said(number, answer):
        check(number, answer)
        start, reply = capsys.readouterr().out.split(": ", 1)
        assert start == f"exercise {number}"
        return reply.removesuffix("\n")

    return said


def numbers_of(cases):
    return [case[0] for case in cases]


@pytest.mark.parametrize("number, answer", RIGHT, ids=numbers_of(RIGHT))
def test_right_answers_are_correct(number, answer, said):
    assert said(number, answer) == "correct"


@pytest.mark.parametrize("number, mistake, hint", MISTAKES, ids=numbers_of(MISTAKES))
def test_a_mistake_gets_its_own_hint(number, mistake, hint, said):
    assert said(number, mistake) == f"not yet: {hint}"


@pytest.mark.parametrize("number, answer, words", WRONG, ids=numbers_of(WRONG))
def test_other_wrong_answers_get_another_hint(number, answer, words, said):
    reply = said(number, answer)
    assert reply.startswith("not yet: ") and words in reply
    assert reply.removeprefix("not yet: ") not in EXERCISES[number].mistakes


@pytest.mark.parametrize("number", EXERCISES)
def test_every_exercise_has_a_wrong_answer_that_is_not_a_known_mistake(number):
    assert EXERCISES[number].also_wrong


@pytest.mark.parametrize("number", EXERCISES)
def test_every_mistake_can_be_tried_on_every_input(number):
    exercise = EXERCISES[number]
    for mistake, _ in pairs(exercise.mistakes):
        for arguments in exercise.inputs or [()]:
            result_of(exercise, mistake, arguments)


# ---- the grader


@pytest.mark.parametrize("number", EXERCISES)
def test_a_stub_is_not_attempted(number, said):
    assert said(number, ...) == "not attempted"


@pytest.mark.parametrize("number", FUNCTIONS)
def test_a_function_that_is_not_written_is_not_attempted(number, said):
    def stub(*_):
        raise NotImplementedError

    assert said(number, stub) == "not attempted"


def test_what_pytorch_has_not_implemented_is_an_error_not_a_stub(said):
    reply = said("1.1", lambda betas: betas.long().softmax(0))
    assert reply.startswith("not yet: it raised NotImplementedError: ")


STRANGE = [None, "ten", [], {}, object(), float("nan"), torch.zeros(2, 3), torch.zeros(0)]


@pytest.mark.parametrize("strange", STRANGE, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("number", EXERCISES)
def test_whatever_an_answer_is_the_reply_is_one_line(number, strange, said):
    for answer in (strange, lambda *_: strange, (lambda *_: strange, lambda *_: strange)):
        reply = said(number, answer)
        assert reply.startswith("not yet: ") and "\n" not in reply


def test_an_exception_is_shown_with_the_line_of_the_reader(said):
    def snr_in_decibels(betas):
        return betas.sqare()

    reply = said("1.1", snr_in_decibels)
    assert reply.startswith("not yet: it raised AttributeError: 'Tensor' object has no attribute")
    assert reply.endswith(", in the line `return betas.sqare()`")


def test_an_exception_is_shown_on_one_line_with_the_innermost_line_of_the_reader(said):
    def helper(betas):
        raise ValueError("too\nlong")

    reply = said("1.1", lambda betas: helper(betas))
    assert reply.startswith("not yet: it raised ValueError: too long, in the line `raise ValueE")


def test_an_exception_inside_the_library_is_shown_with_the_line_of_the_reader(said):
    def draw_from(model, prompt, z):
        return model.decode(z.flatten())[0]

    assert said("0.3", draw_from).endswith(", in the line `return model.decode(z.flatten())[0]`")


def test_an_exception_in_the_call_of_the_answer_shows_no_line_of_ours(said):
    reply = said("5.1", "ten")
    assert reply.startswith("not yet: the answer is not of the kind that is asked for (raised ")
    assert "in the line" not in reply


@pytest.mark.parametrize("number", ["1.1", "1.4", "5.2", "6.3", "7.5"])
def test_none_asks_for_the_return(number, said):
    assert said(number, lambda *_: None).startswith("not yet: it gave None; is a `return` missing?")


def test_another_shape_is_told_with_the_right_one(said):
    reply = said("1.1", lambda betas: torch.zeros(3, 2))
    assert reply == "not yet: the answer has shape (3, 2); it must have shape (40,)"
    reply = said("2.1", lambda s, alpha_bar: torch.zeros(2))
    assert reply.endswith("has shape (2,); it must have shape (), a single number")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_dtype_is_the_same_answer(dtype, said):
    right = EXERCISES["1.1"].reference
    assert said("1.1", lambda betas: right(betas).to(dtype)) == "correct"
    assert said("8.4", lambda *images: EXERCISES["8.4"].reference(*images).int()) == "correct"


def test_a_single_number_may_come_in_any_shape(said):
    assert said("4.1", torch.tensor([[859]])) == "correct"
    assert said("4.1", torch.tensor([859.0], requires_grad=True)) == "correct"


def test_an_answer_just_inside_the_tolerance_passes_and_just_outside_fails(said):
    right = EXERCISES["7.3"].reference
    assert said("7.3", lambda *numbers: right(*numbers) * (1 + 0.9e-4)) == "correct"
    assert said("7.3", lambda *numbers: right(*numbers) * (1 + 1.2e-4)) != "correct"


def test_an_answer_that_changes_its_inputs_changes_only_its_own(said):
    def spoils_its_input(z):
        white = EXERCISES["4.3"].reference(z)
        z.zero_()
        return white

    assert said("4.3", spoils_its_input) == "correct"
    assert said("4.3", spoils_its_input) == "correct"


def test_an_unknown_exercise_is_an_error():
    with pytest.raises(ValueError, match="number is '99.1'; the exercises are 0.1, "):
        check("99.1", 1)


# ---- the tables


def test_the_chapters_ask_for_every_exercise_and_for_no_other():
    asked = []
    for path in sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb")):
        asked += re.findall(r'check\(\\"([^\\]+)\\"', path.read_text(encoding="utf-8"))
    assert asked == list(EXERCISES)


def test_flops_of_a_convolution_are_those_that_pytorch_counts():
    exercise = EXERCISES["9.2"]
    for c_in, c_out, k, side, stride in exercise.inputs:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            convolution = torch.nn.Conv2d(c_in, c_out, k, stride, padding=k // 2)
            convolution(torch.zeros(1, c_in, side, side))
        flops = exercise.reference(c_in, c_out, k, side, stride)
        assert flops == counter.get_total_flops()


@pytest.mark.slow
def test_a_block_in_diffusers_names_is_a_block_of_diffusers():
    from diffusers import Transformer2DModel

    block = random_block(seed=3)
    theirs = Transformer2DModel(2, 8, 16, norm_num_groups=4, cross_attention_dim=12)
    theirs.load_state_dict(in_diffusers_names(block))
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 3, 3, generator=random)
    context = torch.randn(2, 5, 12, generator=random)
    with torch.no_grad():
        ours = block.double()(x.double(), block.cross_attn.keys_values(context.double()))
        theirs = theirs.double()(x.double(), context.double()).sample
    torch.testing.assert_close(theirs, ours)
