"""Coordinate reference systems as files state them: well-known text and GeoTIFF keys, whole, contradictory, damaged."""

import struct
import warnings

import numpy as np
import pytest
from files import patched
from test_las import made

import kpcore as kp
from kpcore.io import Reference, read, reference, write_labels

FOOT, SURVEY_FOOT = 0.3048, 1200 / 3937
NAD83 = 'GEOGCS["NAD83",DATUM["D",SPHEROID["GRS 1980",6378137,298.257]],PRIMEM["G",0],UNIT["degree",0.01745329]]'
OREGON = f'PROJCS["Oregon North (ft)",{NAD83},PROJECTION["Lambert_Conformal_Conic_2SP"],UNIT["foot",0.3048]]'
NEW_MEXICO = f"""COMPD_CS["NAD83 / New Mexico ""C"" [ftUS] + NAVD88",
  PROJCS["NAD83 / New Mexico Central (ftUS)", {NAD83}, PROJECTION["Transverse_Mercator"],
    PARAMETER["scale_factor",0.9999], UNIT["US survey foot", 0.304800609601219, AUTHORITY["EPSG","9003"]],
    AXIS["X",EAST], AXIS["Y",NORTH]],
  VERT_CS["NAVD88 height (m)", VERT_DATUM["NAVD 88",2005], UNIT["metre",1.0], AXIS["Up",UP]]]"""
BASE = """BASEGEOGCRS["NAD83(2011)",DATUM["N",ELLIPSOID["GRS 1980",6378137,298.257,LENGTHUNIT["metre",1]]],
  PRIMEM["Greenwich",0,ANGLEUNIT["degree",0.0174532925199433]]],CONVERSION["c",METHOD["Transverse Mercator"],
  PARAMETER["False easting",500000,LENGTHUNIT["metre",1]],PARAMETER["Scale",0.9999,SCALEUNIT["unity",1]]]"""
SURVEY = 'LENGTHUNIT["US survey foot",0.304800609601219]'
PROJECTED = f"""PROJCRS["New Mexico Central (ftUS)",{BASE},CS[Cartesian,2],AXIS["easting (X)",east,ORDER[1],{SURVEY}],
  AXIS["northing (Y)",north,ORDER[2],{SURVEY}],USAGE[SCOPE["s"],AREA["a"],BBOX[31.78,-107.73,37,-104.84]]]"""
HEIGHT = 'VERTCRS["NAVD88 height (ft)",VDATUM["V"],CS[vertical,1],AXIS["height (H)",up],LENGTHUNIT["foot",0.3048]]'
SPATIAL = f"""PROJCRS["in three dimensions",{BASE},CS[Cartesian,3],AXIS["(E)",east,ORDER[1],LENGTHUNIT["metre",1]],
  AXIS["(N)",north,ORDER[2],LENGTHUNIT["metre",1]],AXIS["(h)",up,ORDER[3],LENGTHUNIT["foot",0.3048]]]"""
DEGREES = """GEOGCRS["WGS 84",DATUM["W",ELLIPSOID["WGS 84",6378137,298.257,LENGTHUNIT["metre",1]]],CS[ellipsoidal,3],
  AXIS["latitude",north,ORDER[1],ANGLEUNIT["degree",0.01745]],AXIS["longitude",east,ORDER[2],ANGLEUNIT["degree",0.01745]],
  AXIS["ellipsoidal height (h)",up,ORDER[3],LENGTHUNIT["metre",1]],ID["EPSG",4979]]"""
ESRI = f"""PROJCS["NAD_1983_HARN",{NAD83},PROJECTION["L"],UNIT["Foot_US",0.3048006096012192]],
  VERTCS["NAVD_1988",VDATUM["N"],PARAMETER["Vertical_Shift",0.0],UNIT["Meter",1.0]]"""
EARTH = """GEODCRS["WGS 84",DATUM["W",ELLIPSOID["W",6378137,298.25]],CS[Cartesian,3],AXIS["(X)",geocentricX],
  AXIS["(Y)",geocentricY],AXIS["(Z)",geocentricZ],LENGTHUNIT["metre",1]]"""
TEXTS = {
    "projected, WKT 1": (OREGON, ("Oregon North (ft)", "projected", FOOT, None)),
    "compound, WKT 1": (NEW_MEXICO, ('NAD83 / New Mexico "C" [ftUS] + NAVD88', "projected", 0.304800609601219, 1.0)),
    "ESRI": (ESRI, ("NAD_1983_HARN", "projected", 0.3048006096012192, 1.0)),
    "round brackets": (OREGON.replace("[", "(").replace("]", ")"), ("Oregon North (ft)", "projected", FOOT, None)),
    "geographic, WKT 1": (NAD83, ("NAD83", "geographic", None, None)),
    "geographic and height": (
        f'COMPD_CS["both",{NAD83},VERT_CS["ftUS",VERT_DATUM["V",2005],UNIT["US survey foot",0.3048006096]]]',
        ("both", "geographic", None, 0.3048006096),
    ),
    "geocentric, WKT 1": ('GEOCCS["WGS 84",DATUM["W"],UNIT["metre",1]]', ("WGS 84", "geocentric", 1.0, 1.0)),
    "local, WKT 1": (
        'LOCAL_CS["site",LOCAL_DATUM["d",32767],UNIT["millimetre",0.001],AXIS["x",EAST],AXIS["y",NORTH],AXIS["z",UP]]',
        ("site", "local", 0.001, 0.001),
    ),
    "projected, WKT 2": (PROJECTED, ("New Mexico Central (ftUS)", "projected", 0.304800609601219, None)),
    "compound, WKT 2": (
        f'COMPOUNDCRS["c",{PROJECTED},{HEIGHT}]', ("c", "projected", 0.304800609601219, 0.3048),
    ),
    "bound": (
        f'BOUNDCRS[SOURCECRS[{PROJECTED}],TARGETCRS[{DEGREES}],ABRIDGEDTRANSFORMATION["t",METHOD["m"]]]',
        ("New Mexico Central (ftUS)", "projected", 0.304800609601219, None),
    ),
    "three dimensions": (SPATIAL, ("in three dimensions", "projected", 1.0, FOOT)),
    "geographic, WKT 2": (DEGREES, ("WGS 84", "geographic", None, 1.0)),
    "geocentric, WKT 2": (EARTH, ("WGS 84", "geocentric", 1.0, 1.0)),
    "engineering": (
        'ENGCRS["plant",EDATUM["e"],CS[Cartesian,2],AXIS["x",east],AXIS["y",north],LENGTHUNIT["foot",0.3048]]',
        ("plant", "local", FOOT, None),
    ),
    "only heights": (HEIGHT, ("NAVD88 height (ft)", "unknown", None, FOOT)),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_units_in_well_known_text(name):
    text, expected = TEXTS[name]
    for variant in (text, f"{text}\0\0", f"\n {text}".replace(",", " ,\r\n\t ")):
        assert reference.from_wkt(variant) == (Reference(*expected, "WKT"), None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (OREGON[:-1], "1 brackets are not closed"),
        (OREGON + "]", "unexpected bracket"),
        (OREGON.replace('"foot"', '"foot'), "brackets are not closed|quotation mark"),
        (OREGON.replace("0.3048", "0"), "the unit foot has no length"),
        (OREGON.replace("0.3048", "nan"), "the unit foot has no length"),
        (OREGON.replace(",0.3048", ""), "the unit foot has no length"),
        ("EPSG:2994", "it starts with 'EPSG:2994'"),
        ("\x01\x02\x03", "it starts with"),
        ("A[" * 1000, "unexpected bracket"),
        ("[]", "unexpected bracket"),
        ('COMPD_CS["empty"]', "it starts with"),
    ],
)
def test_damaged_text_says_so(text, reason):
    stated, warning = reference.from_wkt(text)
    assert stated == Reference(None, "unknown", None, None, "WKT")
    assert warning.startswith("its coordinate reference system, in WKT, is damaged (")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(warning)


def test_text_cut_anywhere_or_with_any_byte_lost():
    """No exception, and never another unit."""
    for text, (_, _, horizontal, vertical) in TEXTS.values():
        for at in range(0, len(text), 9):
            for damaged in (text[:at], text[:at] + text[at + 1 :]):
                stated, _ = reference.from_wkt(damaged)
                if at and damaged == text[:at] and text is not ESRI:  # which ends after the first of its two, too
                    assert stated.horizontal is None and stated.vertical is None
        assert (horizontal, vertical) == reference.from_wkt(text)[0][2:4]


def test_a_system_without_a_unit_or_with_two():
    for text in (OREGON.replace(',UNIT["foot",0.3048]', ""), PROJECTED.replace(SURVEY, 'LENGTHUNIT["m",1]', 1)):
        stated, warning = reference.from_wkt(text)
        assert (stated.kind, stated.horizontal) == ("projected", None)
        assert warning == "its coordinate reference system, in WKT, states no one unit of x and y"


# ---- GeoTIFF keys


def keys(values):
    """The records 34735, 34736 and 34737 of values by key: int, float or str."""
    entries, doubles, text = [], b"", b""
    for key, value in values.items():
        if isinstance(value, int):
            entries.append((key, 0, 1, value))
        elif isinstance(value, float):
            entries.append((key, 34736, 1, len(doubles) // 8))
            doubles += struct.pack("<d", value)
        else:
            entries.append((key, 34737, len(value) + 1, len(text)))
            text += value.encode() + b"|"
    numbers = [1, 1, 0, len(entries), *(number for entry in entries for number in entry)]
    return struct.pack(f"<{len(numbers)}H", *numbers), doubles, text + b"\0"


CITED = "NAD83(2011) / Colorado North (ftUS) + NAVD88 height (m)"
KEYS = [
    ({1024: 1, 3072: 32610}, ("EPSG:32610", "projected", 1.0, None)),  # UTM
    ({1024: 1, 3072: 28992, 4096: 5709, 4099: 9001}, ("EPSG:28992", "projected", 1.0, 1.0)),  # AHN
    ({1024: 1, 3072: 2994, 3076: 9002}, ("EPSG:2994", "projected", FOOT, None)),
    ({1024: 1, 3072: 2227, 3076: 9003, 4099: 9002}, ("EPSG:2227", "projected", SURVEY_FOOT, FOOT)),
    ({1024: 1, 3072: 2227}, ("EPSG:2227", "projected", None, None)),  # state plane: feet, but no table of ours says so
    ({1024: 1, 1026: CITED, 3072: 6430}, (CITED, "projected", SURVEY_FOOT, None)),
    ({1024: 1, 1026: CITED, 3072: 6430, 4096: 5703}, (CITED, "projected", SURVEY_FOOT, 1.0)),
    (
        {1024: 1, 3073: "NAD83 / Oregon North (ft)", 4097: "NAVD88 height (ftUS)"},
        ("NAD83 / Oregon North (ft)", "projected", FOOT, SURVEY_FOOT),
    ),
    (
        {1024: 1, 3072: 32767, 3073: "LUnits = Foot_US"},
        ("LUnits = Foot_US", "projected", SURVEY_FOOT, None),
    ),
    ({1024: 1, 3072: 2227, 4096: 6360}, ("EPSG:2227", "projected", None, SURVEY_FOOT)),
    ({1024: 1, 3072: 32767, 3076: 32767, 3077: 0.3048}, (None, "projected", FOOT, None)),
    ({1024: 1, 3076: 32767, 3077: -1.0}, (None, "projected", None, None)),
    ({1024: 1, 3072: 32610, 3076: 9003}, ("EPSG:32610", "projected", SURVEY_FOOT, None)),  # the key says more
    ({1024: 2, 2048: 4326}, ("EPSG:4326", "geographic", None, None)),
    ({1024: 2, 2048: 4326, 2049: "WGS 84", 4099: 9001}, ("WGS 84", "geographic", None, 1.0)),
    (
        {1024: 1, 2048: 4326, 2052: 9001, 2054: 9102, 3072: 32612},
        ("EPSG:32612", "projected", 1.0, None),
    ),  # both, laspy 250
    ({1024: 3, 2048: 4978}, ("EPSG:4978", "geocentric", 1.0, 1.0)),
    ({1024: 3, 2048: 4978, 2052: 9036}, ("EPSG:4978", "geocentric", 1000.0, 1000.0)),
    ({1024: 3, 2048: 4326}, ("EPSG:4326", "unknown", None, None)),  # which is of degrees: a contradiction
    ({3072: 25832}, ("EPSG:25832", "projected", 1.0, None)),  # without a type of model
    ({1024: 32767, 2048: 4258}, ("EPSG:4258", "geographic", None, None)),
    ({1024: 32767}, (None, "unknown", None, None)),
]


@pytest.mark.parametrize(("values", "expected"), KEYS)
def test_units_in_geotiff_keys(values, expected):
    assert reference.from_keys(*keys(values)) == (Reference(*expected, "GeoTIFF keys"), None)


def test_survey_feet_are_not_international_feet():
    """Two parts in a million: 1 m at an easting of 500 km."""
    assert 1.9e-6 < SURVEY_FOOT / FOOT - 1 < 2.1e-6
    assert reference.UNITS[9003] == SURVEY_FOOT and reference.UNITS[9002] == FOOT


def test_a_unit_of_no_table_is_unknown_not_metres():
    stated, warning = reference.from_keys(*keys({1024: 1, 3072: 32610, 3076: 9042}))
    assert (stated.horizontal, warning) == (None, "its unit has the EPSG code 9042, which kpcore does not know")


def test_damaged_keys_say_so():
    directory, doubles, text = keys({1024: 1, 3076: 32767, 3077: 0.3048, 1026: "a name"})
    whole = reference.from_keys(directory, doubles, text)
    assert whole == (Reference("a name", "projected", FOOT, None, "GeoTIFF keys"), None)
    assert reference.from_keys(directory + bytes(8), doubles, text) == whole  # with zeros behind, as libLAS writes them
    assert (
        reference.from_keys(b"", doubles, text) == reference.from_keys(bytes(16), b"", b"") == (None, None)
    )  # laspy 227
    without_number = directory[:6] + bytes(2) + directory[8:]  # as laspy 197
    for damaged in ((without_number, doubles, text), (directory[:-1], doubles, text), (directory, doubles[:-1], text),
                    (directory, doubles, b""), (b"\2" + directory[1:], doubles, text)):  # fmt: skip
        stated, warning = reference.from_keys(*damaged)
        assert stated.horizontal in (FOOT, None)
        assert warning == "the GeoTIFF keys of its coordinate reference system are damaged: its unit may be unknown"
    rng = np.random.default_rng(0)
    for _ in range(2000):
        changed = bytearray(directory + doubles + text)
        changed[rng.integers(len(changed))] = rng.integers(256)
        at, end = len(directory), len(directory) + len(doubles)
        reference.from_keys(bytes(changed[:at]), bytes(changed[at:end]), bytes(changed[end:]))


# ---- files


def tiff(values):
    return [
        (b"LASF_Projection", number, data) for number, data in zip((34735, 34736, 34737), keys(values), strict=True)
    ]


WKT = (b"LASF_Projection", 2112, OREGON.encode() + b"\0")
METRES = tiff({1024: 1, 3072: 32610, 4099: 9003})


def with_bit(data):
    return patched(data, 6, "<H", 16)


@pytest.mark.parametrize("extended", [False, True])
def test_which_of_two_records_counts(write, extended):
    """The WKT bit of the global encoding decides; the other one may add the unit of z; contradictions are told."""

    def file(records, bit=False):
        data = made(1, extended=records) if extended else made(1, records=records)
        return write("a.las", with_bit(data) if bit else patched(data, 6, "<H", 0))

    assert read(file([WKT])).reference == Reference("Oregon North (ft)", "projected", FOOT, None, "WKT")
    assert read(file([WKT], True)).reference == read(file([WKT])).reference
    assert read(file([])).reference is None
    assert read(file(METRES, True)).reference == Reference("EPSG:32610", "projected", 1.0, SURVEY_FOOT, "GeoTIFF keys")
    for bit, first, second in ((False, "1 m by its GeoTIFF keys", "0.3048 m by its WKT"),
                               (True, "0.3048 m by its WKT", "1 m by its GeoTIFF keys")):  # fmt: skip
        path = file([WKT, *METRES], bit)
        with pytest.warns(UserWarning, match=f"a.las: its unit of x and y is {first}, {second}; the first counts"):
            stated = read(path).reference
        assert (stated.horizontal, stated.vertical) == ((FOOT, None) if bit else (1.0, SURVEY_FOOT))
    feet = tiff({1024: 1, 3076: 9002, 4099: 9003})
    both = Reference("Oregon North (ft)", "projected", FOOT, SURVEY_FOOT, "WKT and GeoTIFF keys")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(file([WKT, *feet], True)).reference == both
        newer = [(b"LASF_Projection", 4224, PROJECTED.encode())]
        assert read(file(newer)).reference.name == "New Mexico Central (ftUS)"
        assert read(file([*newer, WKT])).reference.name == "Oregon North (ft)"
        others = [(b"liblas", 2112, b"]"), (b"LASF_Projection", 7, b"]"), (b"LASF_Spec", 34735, b"1")]
        assert read(file([*others, WKT])).reference.horizontal == FOOT


@pytest.mark.parametrize(
    ("form", "minor", "counts"), [(1, 4, 1.0), (5, 3, 1.0), (6, 4, FOOT), (10, 4, FOOT), (1, 5, FOOT)]
)
def test_point_formats_and_versions_that_require_text(write, form, minor, counts):
    """Although the bit is not set; GeoTIFF keys are not allowed there (laspy 266)."""
    path = write("a.las", patched(made(form, minor, records=[WKT, *METRES]), 6, "<H", 0))
    with pytest.warns(UserWarning, match="the first counts"):
        assert read(path).reference.horizontal == counts


def test_a_damaged_record_is_told_and_replaced_by_nothing(write):
    path = write("a.las", with_bit(made(6, records=[(*WKT[:2], WKT[2][:-5]), *METRES])))
    with pytest.warns(UserWarning, match=r"in WKT, is damaged \(2 brackets are not closed\): its unit is unknown"):
        assert read(path).reference == Reference(None, "unknown", None, None, "WKT")
    path = write("b.las", patched(made(0, 2, records=[(b"LASF_Projection", 34735, b"12345678")]), 6, "<H", 0))
    with pytest.warns(UserWarning, match="the GeoTIFF keys of its coordinate reference system are damaged"):
        assert read(path).reference.horizontal is None
    blank = write("c.las", with_bit(made(6, records=[(b"LASF_Projection", 2112, bytes(50))])))
    assert read(blank).reference is None


def test_a_copy_with_labels_has_the_same_reference(write, tmp_path):
    pytest.importorskip("lazrs")
    path = write("a.las", with_bit(made(6, extended=[WKT])))
    write_labels(path, tmp_path / "b.laz", np.arange(100))
    assert read(tmp_path / "b.laz").reference == read(path).reference != None  # noqa: E711


def test_references_of_real_files(shared):
    pytest.importorskip("lazrs")
    name = "NAD_1983_HARN_Lambert_Conformal_Conic"
    expected = {
        "autzen_trim.laz": Reference(name, "projected", FOOT, None, "GeoTIFF keys"),
        "lone-star.laz": Reference("EPSG:4326", "unknown", None, None, "GeoTIFF keys"),  # as geocentric; it is in UTM
        **dict.fromkeys(("ahn3_cropped_1.laz", "brighton_small.laz", "ign_50x100m.las", "lion_takanawa.copc.laz")),
    }
    for file, stated in expected.items():
        assert read(shared / "data" / file).reference == stated
    data = (shared / "data/autzen_trim.laz").read_bytes()
    at = data.index(b"PROJCS[")
    text = data[at : at + struct.unpack_from("<H", data, at - 34)[0]].decode()
    assert reference.from_wkt(text)[0] == Reference(name, "projected", FOOT, None, "WKT")


def test_other_formats_state_none(write):
    assert read(write("a.xyz", b"1 2 3\n")).reference is None
    assert kp.io.Reference._fields == ("name", "kind", "horizontal", "vertical", "source")
