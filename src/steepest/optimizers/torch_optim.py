"""torch.optim's own optimizers: by the lower-case names of their classes, and with their papers."""

from __future__ import annotations

import torch

TORCH: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
}

PAPERS = {
    "adadelta": "Zeiler, arXiv:1212.5701",
    "adafactor": "Shazeer and Stern, arXiv:1804.04235",
    "adagrad": "Duchi et al., JMLR 12 (2011) 2121",
    "adam": "Kingma and Ba, arXiv:1412.6980",
    "adamax": "Kingma and Ba, arXiv:1412.6980, section 7.1",
    "adamw": "Loshchilov and Hutter, arXiv:1711.05101",
    "asgd": "Polyak and Juditsky, SIAM J. Control Optim. 30 (1992) 838",
    "lbfgs": "Liu and Nocedal, Math. Program. 45 (1989) 503",
    "muon": "Jordan et al., https://kellerjordan.github.io/posts/muon; Liu et al., arXiv:2502.16982",
    "nadam": "Dozat, ICLR 2016 workshop",
    "radam": "Liu et al., arXiv:1908.03265",
    "rmsprop": "Tieleman and Hinton, Neural Networks for Machine Learning, lecture 6.5 (2012)",
    "rprop": "Riedmiller and Braun, IEEE ICNN (1993) 586",
    "sgd": "Robbins and Monro, Ann. Math. Stat. 22 (1951) 400; momentum: Sutskever et al., ICML 2013",
    "sparseadam": "Kingma and Ba, arXiv:1412.6980",
}
"""Where each was published."""
