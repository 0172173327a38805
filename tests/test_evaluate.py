"""Confusion matrix, classification report and the choice of misclassified pictures."""

import pytest
import torch

from engine import balanced_choice, score
from evaluate import classification_report, confusion_matrix, matrix_text

LABELS = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
PREDICTIONS = torch.tensor([0, 0, 0, 1, 2, 1, 1, 0, 2, 2, 2, 2])
MATRIX = torch.tensor([[3, 1, 1], [1, 2, 0], [0, 0, 4]])

# What scikit-learn 1.7 prints for the two cases.
REPORT = """\
              precision    recall  f1-score   support

         cat       0.75      0.60      0.67         5
  automobile       0.67      0.67      0.67         3
           a       0.80      1.00      0.89         4

    accuracy                           0.75        12
   macro avg       0.74      0.76      0.74        12
weighted avg       0.75      0.75      0.74        12"""
REPORT_WITH_AN_EMPTY_CLASS = """\
                        precision    recall  f1-score   support

                   cat       0.80      0.80      0.80         5
a very long class name       0.67      0.67      0.67         3
                  none       0.00      0.00      0.00         0

              accuracy                           0.75         8
             macro avg       0.49      0.49      0.49         8
          weighted avg       0.75      0.75      0.75         8"""


def test_rows_are_actual_and_columns_predicted():
    assert torch.equal(confusion_matrix(LABELS, PREDICTIONS, 3), MATRIX)
    assert confusion_matrix(LABELS, PREDICTIONS, 5).shape == (5, 5)


@pytest.mark.parametrize("labels, predictions", [([0, 3], [0, 0]), ([0, 0], [0, -1]), ([0], [0, 1])])
def test_a_class_outside_the_matrix_is_refused(labels, predictions):
    with pytest.raises(ValueError):
        confusion_matrix(torch.tensor(labels), torch.tensor(predictions), 3)


def test_report_is_scikit_learns():
    assert classification_report(MATRIX, ["cat", "automobile", "a"]) == REPORT
    matrix = torch.tensor([[4, 1, 0], [1, 2, 0], [0, 0, 0]])
    assert classification_report(matrix, ["cat", "a very long class name", "none"]) == REPORT_WITH_AN_EMPTY_CLASS


def test_matrix_text_has_every_count_in_its_place():
    rows = [line.split() for line in matrix_text(MATRIX, ["cat", "dog", "frog"]).splitlines()]
    assert rows == [["0", "1", "2"], ["cat", "0", "3", "1", "1"], ["dog", "1", "1", "2", "0"], ["frog", "2", "0", "0", "4"]]


def test_mistakes_come_from_every_actual_class_in_turn():
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 2])
    predictions = torch.tensor([1, 2, 0, 1, 0, 2, 1])
    assert balanced_choice(labels, predictions != labels, 4).tolist() == [0, 4, 6, 1]
    assert balanced_choice(labels, predictions != labels, 100).tolist() == [0, 4, 6, 1, 3]
    assert balanced_choice(labels, labels != labels, 4).tolist() == []


def test_score_is_the_mean_over_pictures():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    labels = torch.tensor([0, 1, 1])
    loss, accuracy = score(logits, labels)
    expected = -(logits.softmax(1)[range(3), labels]).log().mean()
    assert loss == pytest.approx(expected.item(), rel=1e-6) and accuracy == pytest.approx(200 / 3)
