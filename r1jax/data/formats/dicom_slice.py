"""One DICOM file: what the geometry and the grey values of a slice depend on, and its stored pixels."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from r1jax.data.formats.files import read_bytes
from r1jax.data.formats.picture import MAX_PIXELS
from r1jax.errors import UserError

DEFLATED = "1.2.840.10008.1.2.1.99"
"""Transfer syntax whose whole file is unpacked at once, without any limit."""
NEEDED = (
    *("SOPInstanceUID", "SeriesInstanceUID", "Modality", "SamplesPerPixel", "PhotometricInterpretation"),
    *("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelSpacing", "ImageOrientationPatient", "ImagePositionPatient"),
)
OPTIONAL = ("NumberOfFrames", "RescaleSlope", "RescaleIntercept")
"""With `NEEDED` all that is looked at beside the pixels; no name, date or number of a patient is."""
DECODERS = "pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"


@dataclass(frozen=True)
class Slice:
    """What the header of one file says.

    Attributes:
      file: Relative to the folder of the data set.
      series: SeriesInstanceUID.
      instance: SOPInstanceUID.
      modality: CT, MR, ...
      syntax: UID of the transfer syntax.
      shape: Rows, columns.
      bits: Allocated, stored, and whether values have a sign.
      spacing: mm between rows, between columns.
      orientation: Unit vectors along a row and along a column, in the patient's x, y, z (LPS).
      position: Centre of the first pixel, mm.
      slope: Value = slope * stored + intercept (HU in CT).
      intercept: See slope.
    """

    file: str
    series: str
    instance: str
    modality: str
    syntax: str
    shape: tuple[int, int]
    bits: tuple[int, int, bool]
    spacing: tuple[float, float]
    orientation: Float[np.ndarray, "2 3"]
    position: Float[np.ndarray, "3"]
    slope: float
    intercept: float

    @property
    def normal(self) -> Float[np.ndarray, "3"]:
        """Unit vector at right angles to the slice."""
        return np.cross(self.orientation[0], self.orientation[1])


def is_dicom(root: Path, name: str) -> bool:
    """Tells by its content whether a file is DICOM.

    Args:
      root: Folder of the data set.
      name: Of the file, relative to it.

    Returns:
      Whether `DICM` follows the 128 bytes of the preamble.
    """
    return read_bytes(root, name, 132)[128:] == b"DICM"


def read_slice(root: Path, name: str) -> Slice:
    """Reads the header of a file.

    Args:
      root: Folder of the data set.
      name: Of the file, relative to it.

    Returns:
      What it says.

    Raises:
      UserError: It is damaged, no slice of a volume, packed in a way that nothing here unpacks; or pydicom is missing.
    """
    dataset, syntax = _dataset(read_bytes(root, name), root / name, pixels=False)
    return _parse(dataset, syntax, name, root / name)


def read_values(root: Path, known: Slice) -> Float[np.ndarray, "rows columns"]:
    """Decodes the pixels of a file.

    Args:
      root: Folder of the data set.
      known: The header when the source was opened.

    Returns:
      Values after slope and intercept: HU in CT.

    Raises:
      UserError: The pixels are damaged or do not fit the header, or the header has changed.
    """
    file = root / known.file
    dataset, syntax = _dataset(read_bytes(root, known.file), file, pixels=True)
    if repr(_parse(dataset, syntax, known.file, file)) != repr(known):
        raise UserError(f"{file} has changed since it was opened: open the folder again")
    import pydicom

    try:
        size = len(dataset.PixelData)
        wanted = known.shape[0] * known.shape[1] * known.bits[0] // 8
        uid = pydicom.uid.UID(syntax)
        if not uid.is_compressed and size != wanted + wanted % 2:
            raise ValueError(f"{size} bytes, where the header says {wanted}")
        if not uid.is_compressed and uid.is_little_endian:
            _check_bits(dataset.PixelData[:wanted], known)
        pixels = pydicom.pixels.pixel_array(dataset, raw=True)
        if pixels.shape != known.shape or pixels.dtype.kind not in "iu":
            raise ValueError(f"{pixels.dtype} {list(pixels.shape)}, where the header says {list(known.shape)}")
    except Exception as error:  # each decoder has errors of its own
        raise UserError(f"the pixels of {file} are damaged ({error}): copy or export it again") from error
    return pixels.astype(np.float64) * known.slope + known.intercept


def _check_bits(data: bytes, known: Slice) -> None:
    """Refuses bits above the stored ones, which decoders cut off: an overlay, or values that do not fit."""
    allocated, stored, signed = known.bits
    words = np.frombuffer(data, f"<u{allocated // 8}")
    above = words >> stored if stored < allocated else np.zeros_like(words)
    sign = (words >> (stored - 1)) & 1 if signed else np.zeros_like(words)
    if not ((above == 0) | (above == sign * (2 ** (allocated - stored) - 1))).all():  # some writers continue the sign
        raise ValueError(f"values beyond its {stored} stored bits")


def _dataset(data: bytes, file: Path, pixels: bool):  # pydicom may not be installed
    """Has pydicom read a file; also gives the transfer syntax."""
    try:
        import pydicom
    except ImportError as error:
        raise UserError(f"{file} needs pydicom: pip install 'r1jax[medical]'") from error
    try:
        syntax = str(pydicom.filereader.read_file_meta_info(file).TransferSyntaxUID)
        if syntax == DEFLATED:
            raise UserError(f"{file} is deflated as a whole: convert it to Explicit VR Little Endian")
        tags = None if pixels else [*NEEDED, *OPTIONAL]
        return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=not pixels, specific_tags=tags), syntax
    except UserError:
        raise
    except Exception as error:  # damaged bytes raise nearly anything; pydicom's own errors share no base
        raise UserError(f"{file} is damaged or no DICOM file ({error}): copy or export it again") from error


def _parse(dataset, syntax: str, name: str, file: Path) -> Slice:  # see _dataset
    """Reads the values of a header and checks them."""
    try:
        values = {tag: dataset.get(tag) for tag in (*NEEDED, *OPTIONAL)}
        frames = int(values["NumberOfFrames"] or 1)
        if frames != 1:
            raise UserError(f"{file} holds {frames} frames: export it as one file a slice (not enhanced)")
        missing = [tag for tag in NEEDED if values[tag] in (None, "")]
        if missing:
            raise UserError(f"{file} lacks {missing[0]}, which slices of volumes have: take it away or export it again")
        rescale = (values["RescaleSlope"], values["RescaleIntercept"])
        if values["Modality"] == "CT" and None in rescale:
            raise UserError(
                f"{file} lacks RescaleSlope or RescaleIntercept: CT without them has no HU, export it again"
            )
        found = Slice(
            file=name,
            series=str(values["SeriesInstanceUID"]),
            instance=str(values["SOPInstanceUID"]),
            modality=str(values["Modality"]),
            syntax=syntax,
            shape=(int(values["Rows"]), int(values["Columns"])),
            bits=(int(values["BitsAllocated"]), int(values["BitsStored"]), bool(values["PixelRepresentation"])),
            spacing=(float(values["PixelSpacing"][0]), float(values["PixelSpacing"][1])),
            orientation=np.array(values["ImageOrientationPatient"], np.float64).reshape(2, 3),
            position=np.array(values["ImagePositionPatient"], np.float64).reshape(3),
            slope=float(1 if rescale[0] is None else rescale[0]),
            intercept=float(0 if rescale[1] is None else rescale[1]),
        )
        kind = (values["PhotometricInterpretation"], values["SamplesPerPixel"], int(values["HighBit"]))
    except UserError:
        raise
    except Exception as error:  # values are read when they are asked for: see _dataset
        raise UserError(f"{file} has a value that makes no sense ({error}): copy or export it again") from error
    if kind != ("MONOCHROME2", 1, found.bits[1] - 1):
        told = f"{kind[0]}, {kind[1]} samples, high bit {kind[2]} of {found.bits[1]}"
        raise UserError(f"{file} has pixels of a kind that is not read ({told}): export it as plain MONOCHROME2")
    _check(found, file)
    return found


def _check(found: Slice, file: Path) -> None:
    """Refuses numbers that no slice has, and pixels that nothing here unpacks."""
    rows, columns = found.shape
    allocated, stored, _ = found.bits
    if not 0 < rows * columns <= MAX_PIXELS or allocated not in (8, 16, 32) or not 0 < stored <= allocated:
        raise UserError(f"{file} says {rows} x {columns} pixels of {stored} bits in {allocated}: export it again")
    gram = found.orientation @ found.orientation.T
    numbers = (*found.spacing, *found.position, found.slope, found.intercept)
    if not np.isfinite(numbers).all() or not np.abs(gram - np.eye(2)).max() < 1e-2:
        raise UserError(f"{file} has no orientation, position or scale that makes sense: export it again")
    if min(found.spacing) <= 0 or found.slope == 0:
        raise UserError(f"{file} has PixelSpacing {found.spacing} and RescaleSlope {found.slope}: export it again")
    import pydicom

    uid = pydicom.uid.UID(found.syntax)
    try:
        able = not uid.is_compressed or pydicom.pixels.get_decoder(uid).is_available
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"{file} has transfer syntax {found.syntax}, which is no picture's: convert it") from error
    if not able:
        raise UserError(f"{file} is packed as {uid.name}, which needs more: pip install {DECODERS}")
