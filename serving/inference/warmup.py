"""Model warm-up: replays recorded requests, so that the first real request is not slow.

File format and limit are TensorFlow Serving's (`servables/tensorflow/saved_model_warmup_util.cc`).
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from serving.errors import ModelLoadError, ServingError
from serving.inference.signatures import DEFAULT_SIGNATURE, Predictor, Signature

WARMUP_FILE = Path("assets.extra", "tf_serving_warmup_requests")
MAX_RECORDS = 1_000


def replay_warmup_records(path: Path, predictor: Predictor) -> int:
    """Run every record of a version's warm-up file.

    Returns:
        The number of records; 0 if the folder `path` has no warm-up file.

    Raises:
        ModelLoadError: a record is damaged, not a predict request, or fails, or there are too many.
    """
    count = 0
    for signature, inputs in read_warmup_records(path, predictor.signatures):
        try:
            predictor.predict(signature, inputs)
        except (ServingError, TypeError, ValueError) as error:
            raise _failed(path, count, error) from error
        count += 1
    return count


def read_warmup_records(path: Path, signatures: Mapping[str, Signature]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Yield the signature and the inputs of every record of a version's warm-up file, if it has one.

    The defaults of a signature replace the inputs that a record omits.

    Raises:
        ModelLoadError: a record is damaged or not a predict request, or there are too many.
    """
    file = path / WARMUP_FILE
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ModelLoadError(f"{file} is not a regular file", code="FAILED_PRECONDITION")
    except FileNotFoundError:
        return
    except OSError as error:
        raise ModelLoadError(f"cannot read {file}: {error.strerror or error}") from error
    import tensorflow as tf
    from google.protobuf.message import DecodeError
    from tensorflow_serving.apis import prediction_log_pb2

    count = 0
    try:
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            if count == MAX_RECORDS:
                raise ModelLoadError(f"{file} holds more than {MAX_RECORDS} warm-up records", code="INVALID_ARGUMENT")
            log = prediction_log_pb2.PredictionLog.FromString(record)
            if log.WhichOneof("log_type") != "predict_log":
                raise ModelLoadError(f"warm-up record {count} of {file} is not a predict request", code="UNIMPLEMENTED")
            request = log.predict_log.request
            name = request.model_spec.signature_name or DEFAULT_SIGNATURE
            inputs = dict(signatures[name].defaults) if name in signatures else {}
            inputs.update((key, tf.make_ndarray(tensor)) for key, tensor in request.inputs.items())
            yield name, inputs
            count += 1
    except tf.errors.DataLossError as error:
        raise ModelLoadError(f"{file} is damaged after {count} records", code="DATA_LOSS") from error
    except tf.errors.OpError as error:
        raise ModelLoadError(f"cannot read {file}: {error}") from error
    except DecodeError as error:
        raise ModelLoadError(f"warm-up record {count} of {file} is damaged", code="DATA_LOSS") from error
    except (TypeError, ValueError) as error:
        raise _failed(path, count, error) from error


def _failed(path: Path, count: int, error: Exception) -> ModelLoadError:
    message = f"warm-up record {count} of {path / WARMUP_FILE} fails: {error}"
    return ModelLoadError(message, code="INVALID_ARGUMENT")
