"""Opens what a path or URL names: a disk, HDFS, S3 or Google's store."""

import os
from datetime import timedelta
from urllib.parse import parse_qsl, unquote, urlsplit

from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

from r1jax.data import bounded
from r1jax.data.bounded import FAILURES, reason
from r1jax.errors import UserError


def is_remote(url: str) -> bool:
    """Tells a URL of a server from a folder of this machine.

    Args:
      url: Path or URL.

    Returns:
      Whether it names a server.
    """
    return "://" in url and not url.startswith("file:")


def divide_options(url: str) -> tuple[str, str]:
    """Divides a URL of a server from its options, so that another path may take its place.

    Args:
      url: Path or URL.

    Returns:
      The path or URL without options, and the options from their question mark on; "" where it has none.
    """
    place, mark, options = url.partition("?") if is_remote(url) else (url, "", "")
    return place, mark + options


def open_filesystem(url: str) -> tuple[FileSystem, str]:
    """Opens what a path or URL names; nothing is asked of a server yet.

    Args:
      url: A path, file:, hdfs://HOST:PORT/PATH (hdfs://NAMESERVICE/PATH and hdfs:///PATH by Hadoop's own files),
        s3://BUCKET/PATH[?endpoint_override=...&region=...&scheme=...] or gs://BUCKET/PATH. Keys come from the
        environment and files of the provider, never from the URL.

    Returns:
      The file system, and the path on it.

    Raises:
      UserError: The URL is of another kind or malformed, or its client is not installed.
    """
    if not is_remote(url):
        path = unquote(urlsplit(url).path) if url.startswith("file:") else os.path.expanduser(url)
        return LocalFileSystem(), os.path.abspath(path)
    parts = urlsplit(url)
    if "@" in parts.netloc:
        place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise UserError(f"the URL of {place} has a user or a key in it: give keys in the environment")
    options = dict(parse_qsl(parts.query))
    try:
        if parts.scheme == "hdfs":
            return PyFileSystem(FSSpecHandler(_hdfs(parts.hostname, parts.port))), unquote(parts.path) or "/"
        if parts.scheme == "s3":
            return _s3(parts.netloc, options), f"{parts.netloc}{unquote(parts.path)}".rstrip("/")
        if parts.scheme == "gs":
            from pyarrow.fs import GcsFileSystem

            patience = timedelta(seconds=bounded.TIMEOUT_S)
            return GcsFileSystem(retry_time_limit=patience), f"{parts.netloc}{unquote(parts.path)}"
    except FAILURES as error:
        raise UserError(f"{url}: {reason(error)}") from error
    raise UserError(f"{url}: there is no client for {parts.scheme}: use a path, file:, hdfs:, s3: or gs:")


def _hdfs(host: str | None, port: int | None):
    """HDFS without a JVM."""
    try:
        from hdfs_native.fsspec import HdfsFileSystem
    except ImportError as error:
        raise UserError("hdfs: needs hdfs-native: pip install 'r1jax[hdfs]'") from error
    return HdfsFileSystem(host=host, port=port)


def _s3(bucket: str, options: dict[str, str]) -> FileSystem:
    """S3 with bounded waiting; the address of another server than Amazon's is an option or in the environment."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem, resolve_s3_region

    known = ("endpoint_override", "region", "scheme")
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UserError(f"s3://{bucket} has the option {unknown[0]!r}: choose among {', '.join(known)}")
    environment = os.environ
    endpoint = options.get("endpoint_override") or environment.get("AWS_ENDPOINT_URL_S3")
    endpoint = endpoint or environment.get("AWS_ENDPOINT_URL")
    region = options.get("region") or environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    return S3FileSystem(
        endpoint_override=endpoint,
        region=region or ("us-east-1" if endpoint else resolve_s3_region(bucket)),
        scheme=options.get("scheme", "https"),
        connect_timeout=min(5.0, bounded.TIMEOUT_S),
        request_timeout=bounded.TIMEOUT_S,
        allow_delayed_open=True,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=2),
    )
