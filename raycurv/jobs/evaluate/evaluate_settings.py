"""Settings of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from raycurv.driver.settings import (
    Adapting,
    Count,
    DataPath,
    DtypeName,
    Execution,
    Globs,
    Identity,
    ModelPath,
    Place,
    Predicting,
    Reading,
    Required,
    Seed,
)


@dataclass(frozen=True)
class EvaluateSettings(Execution, Reading, Adapting, Predicting):
    """Loss, perplexity and accuracy of a model on a data set."""

    model: Required[ModelPath] = ""
    """Directory with an HF config.json and safetensors weights, `org/name` or `org/name@REVISION`
    on the Hugging Face hub, or `package.module:factory`. A path that exists is a path."""
    ignore_tensors: Identity[Globs] = ()
    """Glob on names of tensors in the model directory that may be left unused, repeatable. Default:
    a tensor that the model does not take, and that could matter, is an error."""
    data: Required[DataPath] = ""
    """Examples, as a fit takes them: file, directory or glob of files, or
    `org/name:CONFIG` on the hub."""
    out: Required[Place] = ""
    """Where results go: an absolute path, or a URI that pyarrow.fs understands."""
    objective: Identity[str | None] = None
    """`causal-lm`, `masked-lm`, `seq2seq-lm`, `classification`, `multi-label`, `regression`,
    `token-classification`, `preference`, or your own as `package.module:Name`. Default: what the
    model directory's `architectures` say it was trained for; of a factory `causal-lm`."""
    max_examples: Identity[Count | None] = None
    """Evaluate a seeded sample of so many examples."""
    seed: Identity[Seed] = 0
    """Seed of the sample of `--max-examples`."""
    dtype: Identity[DtypeName] = "float32"
    """Number type that the model computes in."""
