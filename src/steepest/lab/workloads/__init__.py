"""The workloads of a race: models with data to train them on."""
