import pytest
import torch

from mlc.optim.distill import combine, distill_loss
from mlc.optim.losses import bce


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def gradient(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    student = student.clone().requires_grad_()
    distill_loss(student, teacher, temperature).sum().backward()
    return student.grad


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_gradient_is_the_closed_form(temperature):
    student, teacher = logits(0), logits(1)
    expected = temperature * ((student / temperature).sigmoid() - (teacher / temperature).sigmoid())
    torch.testing.assert_close(gradient(student, teacher, temperature), expected)


def test_no_gradient_where_the_student_agrees_and_none_for_the_teacher():
    student, teacher = logits(0), logits(0).requires_grad_()
    torch.testing.assert_close(gradient(student, teacher, 2.0), torch.zeros(6, 4))
    distill_loss(student.requires_grad_(), teacher, 2.0).sum().backward()
    assert teacher.grad is None


def test_a_hot_teacher_compares_logits():
    student, teacher = logits(0), logits(1)
    torch.testing.assert_close(gradient(student, teacher, 1000.0), (student - teacher) / 4, rtol=1e-3, atol=1e-4)


def test_temperature_one_is_bce_with_the_teachers_probabilities_in_float32():
    student, teacher = logits(0).bfloat16(), logits(1).bfloat16()
    value = distill_loss(student, teacher, 1.0)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, bce(student, teacher.float().sigmoid()))


def test_combine_is_linear_in_the_teachers_share():
    hard, soft = torch.rand(3, 2), torch.rand(3, 2)
    torch.testing.assert_close(combine(hard, soft, 0.0), hard)
    torch.testing.assert_close(combine(hard, soft, 1.0), soft)
    torch.testing.assert_close(combine(hard, soft, 0.3), 0.7 * hard + 0.3 * soft)
