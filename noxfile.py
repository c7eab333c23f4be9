"""The versions of torch that normfx answers for: `nox` runs the default tests on each, `nox -s torch-2.13` on one.

Newest is what the index has: where an installation caps torch, lift the cap for that session alone with
PIP_CONFIG_FILE=/dev/null and an empty PIP_CONSTRAINT.
"""

import nox

VERSIONS = ("2.11", "2.13", "2.14", "newest")

OLDER = ("transformers", "pytest>=8", "pytest-xdist", "pytest-cov", "expecttest", "hypothesis")
"""What the tests need next to an older torch: timm and torchvision are tied to one torch each, so it goes without."""

nox.options.error_on_missing_interpreters = True
nox.options.stop_on_first_error = False


def versioned(torch: str) -> None:
    """Make the session of one version, which pip then reports, so that a log says what was tested."""

    @nox.session(name=f"torch-{torch}")
    def tests(session: nox.Session) -> None:
        if torch == "newest":
            session.install("-e", ".[test]")
        else:
            # the interpreter of Triton 3.6, of torch 2.11, takes one-element arrays for numbers; numpy 2.4 does not
            numpy = "numpy<2.4" if torch == "2.11" else "numpy"
            session.install(f"torch=={torch}.*", numpy, *OLDER)
            session.install("-e", ".")
        session.run("python", "-c", "import torch; print('torch', torch.__version__)")
        session.run("pytest", "-n", "2", "-q", *session.posargs)


@nox.session(default=False)
def clients(session: nox.Session) -> None:
    """The libraries of docs/clients.md, all of them."""
    session.install("-e", ".[clients]")
    session.run("pytest", "-n", "2", "-q", "-m", "slow or not slow", "tests/clients", *session.posargs)
    session.run("python", "tests/clients/table.py")


for version in VERSIONS:
    versioned(version)
