"""Newton's method and its relatives: optimizers of one vector of all parameters, which evaluate the loss themselves."""
