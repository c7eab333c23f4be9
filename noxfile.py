"""The versions of torch that normfx answers for: `nox` runs the default tests on each."""

import nox


@nox.session(python=["3.11", "3.12"])
@nox.parametrize("torch", ["2.11", "2.13", "newest"])
def tests(session: nox.Session, torch: str) -> None:
    """The default tests; timm and torchvision are tied to one torch each, so older ones go without."""
    if torch == "newest":
        session.install("-e", ".[test]")
    else:
        session.install(
            f"torch=={torch}.*", "transformers", "pytest", "pytest-xdist", "expecttest", "hypothesis", "numpy"
        )
        session.install("-e", ".")
    session.run("pytest", "-n", "2", "-q")
