import pytest
import torch

from mlc.optim.distill import combine, distill_loss, feature_loss, larger, soften, soften_probabilities
from mlc.optim.losses import bce


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def gradient(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    student = student.clone().requires_grad_()
    distill_loss(student, soften(teacher, temperature), temperature).sum().backward()
    return student.grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradient_is_the_closed_form(temperature):
    student, teacher = logits(0), logits(1)
    expected = temperature * ((student / temperature).sigmoid() - (teacher / temperature).sigmoid())
    torch.testing.assert_close(gradient(student, teacher, temperature), expected)


def test_no_gradient_where_the_student_agrees_and_none_for_the_teacher():
    student, teacher = logits(0), logits(0).requires_grad_()
    torch.testing.assert_close(gradient(student, teacher, 2.0), torch.zeros(6, 4))
    distill_loss(student.requires_grad_(), soften(teacher, 2.0), 2.0).sum().backward()
    assert teacher.grad is None


def test_a_hot_teacher_compares_logits():
    student, teacher = logits(0), logits(1)
    torch.testing.assert_close(gradient(student, teacher, 1000.0), (student - teacher) / 4, rtol=1e-3, atol=1e-4)


def test_temperature_one_is_bce_with_the_teachers_probabilities_in_float32():
    student, teacher = logits(0).bfloat16(), logits(1).bfloat16()
    value = distill_loss(student, soften(teacher, 1.0), 1.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, bce(student, teacher.float().sigmoid()))


def test_combine_is_linear_in_the_teachers_share():
    hard, soft = torch.rand(3, 2), torch.rand(3, 2)
    torch.testing.assert_close(combine(hard, soft, 0.0), hard)
    torch.testing.assert_close(combine(hard, soft, 1.0), soft)
    torch.testing.assert_close(combine(hard, soft, 0.3), 0.7 * hard + 0.3 * soft)


def test_probabilities_are_softened_as_their_logits_are():
    teacher = logits(1)
    for temperature in (1.0, 3.0):
        torch.testing.assert_close(
            soften_probabilities(teacher.sigmoid(), temperature), soften(teacher, temperature), rtol=1e-4, atol=1e-6
        )
    assert soften_probabilities(torch.tensor([0.0, 1.0]), 2.0).tolist() == [0.0, 1.0]


def test_the_larger_of_label_and_teacher():
    target, probabilities = torch.tensor([[0.0, 1.0, 0.05, 0.95]]), torch.tensor([[0.7, 0.2, 0.01, 1.0]])
    assert torch.equal(larger(target, probabilities), torch.tensor([[0.7, 1.0, 0.05, 1.0]]))


def test_feature_loss_is_one_minus_the_cosine_and_teaches_no_teacher():
    student = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[3.0, 0.0], [-1.0, -1.0], [0.0, 1.0]], requires_grad=True)
    value = feature_loss(student, teacher)
    torch.testing.assert_close(value, torch.tensor([0.0, 2.0, 1.0]))
    value.sum().backward()
    assert teacher.grad is None
    # d(1 - cos)/ds = -(t / |t| - cos s / |s|) / |s|: zero along s, and of no length for a student that agrees
    torch.testing.assert_close(student.grad, torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.0, -0.5]]))
