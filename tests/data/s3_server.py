"""A server of s3 on loopback, with one bucket."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest


@contextmanager
def serving_bucket(name: str) -> Iterator[str]:
    """Gives an empty bucket to a block; until its end the environment leads to the server, also that of new processes.

    Skips the test without the packages of the server.
    """
    boto3 = pytest.importorskip("boto3")
    server_of = pytest.importorskip("moto.server").ThreadedMotoServer
    patch = pytest.MonkeyPatch()
    server = server_of(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for variable, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "user",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        patch.setenv(variable, value)
    try:
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=name)
        yield name
    finally:
        server.stop()
        patch.undo()


def upload(bucket: str, files: Mapping[str, bytes]) -> None:
    """Writes objects, by key, into a bucket of `serving_bucket`."""
    import boto3

    client = boto3.client("s3", region_name="us-east-1")
    for name, content in files.items():
        client.put_object(Bucket=bucket, Key=name, Body=content)
