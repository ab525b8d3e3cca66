"""Wrong arguments of the functional API are refused by an error that names them."""

import pytest
import torch

import steepest

# Errors.

G, EYE, ONE = torch.zeros(2, 3), [torch.eye(2), torch.eye(3)], torch.eye(2)
REFRESH = steepest.update_eigenbasis_and_exp_avgs
WRONG = [
    (lambda: steepest.precondition([1.0], EYE), TypeError, "x must be a tensor"),
    (lambda: steepest.precondition(torch.zeros(3), EYE), ValueError, r"x must be matrices \[..., m, n\]"),
    (lambda: steepest.precondition(G, ONE), TypeError, "eigenbasis_list must be a list"),
    (lambda: steepest.precondition(G, EYE[::-1]), ValueError, r"eigenbasis_list\[0\] has shape \[3, 3\]; .* \[2, 2\]"),
    (lambda: steepest.precondition(G, [*EYE, ONE]), ValueError, "eigenbasis_list has length 3"),
    (lambda: steepest.precondition(G, ["Q", None]), TypeError, r"eigenbasis_list\[0\] must be a tensor"),
    (lambda: steepest.precondition(G, [torch.zeros(2)]), ValueError, r"eigenbasis_list\[0\] must be matrices"),
    (lambda: steepest.precondition(G, [torch.zeros(2, 3)]), ValueError, r"eigenbasis_list\[0\]"),
    (lambda: steepest.precondition(G.expand(4, 2, 3), [ONE.expand(5, 2, 2)]), ValueError, r"eigenbasis_list\[0\]"),
    (lambda: steepest.precondition(G, [ONE], [[1], [0]]), ValueError, r"eigenbasis_list\[0\] has shape \[2, 2\]"),
    (lambda: steepest.precondition(G, EYE, [[1], [0]]), ValueError, "eigenbasis_list has length 2"),
    (lambda: steepest.precondition(G, EYE, dims=[[2], [1]]), ValueError, "dims="),
    (lambda: steepest.precondition(G, EYE, dims=[[0, 1], [0, 1]]), ValueError, "dims="),
    (lambda: steepest.precondition(G, EYE, dims=[0, 1]), ValueError, "dims="),
    (lambda: steepest.precondition(G, EYE, dims=1), ValueError, "dims="),
    (lambda: steepest.init_kronecker_factors([3]), ValueError, "grad_shape"),
    (lambda: steepest.update_kronecker_factors([torch.eye(3), None], G, 0.9), ValueError, "kronecker_factor_list"),
    (lambda: steepest.update_kronecker_factors(EYE, G.expand(4, 2, 3), 0.9), ValueError, r"factor_list\[0\].*4, 2, 2"),
    (lambda: steepest.update_kronecker_factors(EYE, None, 0.9), TypeError, "grad must be a tensor"),
    (
        lambda: steepest.update_kronecker_factors_kl_shampoo(EYE, G, 0.9, EYE[::-1], 1e-8),
        ValueError,
        r"eigenbasis_list\[0\]",
    ),
    (lambda: REFRESH(EYE, EYE[:1], G, G), ValueError, "every factor must have a basis"),
    (lambda: REFRESH(EYE, [ONE, None], G, G), ValueError, "every factor must have a basis"),
    (lambda: REFRESH(EYE[:1], EYE, G, G), ValueError, "every factor must have a basis"),
    (lambda: REFRESH(EYE, EYE, G, G.T), ValueError, "exp_avg has shape"),
    (lambda: REFRESH(EYE, EYE, G.T, G.T), ValueError, r"list\[0\] has shape \[2, 2\]; it must be \[3, 3\]"),
    (lambda: steepest.get_eigenbasis_qr(EYE, None, G), TypeError, "eigenbasis_list must be a list"),
    (lambda: steepest.get_eigenbasis_eigh([ONE, G]), ValueError, r"kronecker_factor_list\[1\]"),
    (lambda: steepest.get_eigenbasis_eigh(ONE), TypeError, "kronecker_factor_list must be a list"),
    (lambda: steepest.all_eigenbases_met_criteria(EYE, EYE[::-1]), ValueError, "a basis of its shape"),
    (lambda: steepest.all_eigenbases_met_criteria(EYE, EYE[:1]), ValueError, "every factor must have a basis"),
]


@pytest.mark.parametrize(("call", "kind", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments_are_refused_in_words(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
