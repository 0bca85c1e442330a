"""What computes log-probs."""


def __getattr__(name: str):
    if name != "Policy":  # its old place; goes with the next version, as those in fastdpo/moved.py
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import warnings

    from fastdpo.model.policy import Policy

    warnings.warn("fastdpo.model.Policy is fastdpo.model.policy.Policy now", FutureWarning, stacklevel=2)
    return Policy
