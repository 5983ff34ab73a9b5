"""Writes DICOM series with pydicom, for the tests of the reader."""

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SERIES = generate_uid(entropy_srcs=["series"])


def slice_of(
    pixels: np.ndarray,
    position: tuple[float, float, float],
    orientation: tuple[float, ...] = (1, 0, 0, 0, 1, 0),
    spacing: tuple[float, float] = (0.7, 0.75),
    series: str = SERIES,
) -> FileDataset:
    """One CT slice of stored values, to be changed and saved."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[series, str(position)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    data.PatientName, data.PatientID = "Doe^Jane", "12345"
    data.SeriesInstanceUID, data.Modality = series, "CT"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.PixelRepresentation = 8 * pixels.dtype.itemsize, int(pixels.dtype.kind == "i")
    data.BitsStored, data.HighBit = data.BitsAllocated, data.BitsAllocated - 1
    data.PixelSpacing, data.ImageOrientationPatient = list(spacing), list(orientation)
    data.ImagePositionPatient = list(position)
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.PixelData = pixels.tobytes()
    return data


def save(data: FileDataset, path: Path) -> Path:
    """Writes a slice, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path
