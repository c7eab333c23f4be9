"""The versions of torch that normfx answers for: `nox` runs the default tests on each."""

import nox


@nox.session(python=["3.11", "3.12"])
@nox.parametrize("torch", ["2.11", "2.13", "newest"])
def tests(session: nox.Session, torch: str) -> None:
    """The default tests; timm and torchvision are tied to one torch each, so older ones go without."""
    if torch == "newest":
        session.install("-e", ".[test]")
    else:
        # the interpreter of Triton 3.6, of torch 2.11, takes one-element arrays for numbers; numpy 2.4 does not
        session.install(
            f"torch=={torch}.*", "transformers", "pytest", "pytest-xdist", "expecttest", "hypothesis", "numpy<2.4"
        )
        session.install("-e", ".")
    session.run("pytest", "-n", "2", "-q")
