from .checkpoints import (
    INTERRUPTED as INTERRUPTED,
    OWN_KEY as OWN_KEY,
    epochs as epochs,
    latest_z as latest_z,
    odd_rows as odd_rows,
    odd_text as odd_text,
    read_weights as read_weights,
    read_z as read_z,
    without_odd as without_odd,
    write_weights as write_weights,
    write_z as write_z,
)
from .devices import (
    Graph as Graph,
    Halving as Halving,
    default_device as default_device,
    device_name as device_name,
    free_memory as free_memory,
    generator as generator,
    half_precision as half_precision,
    on_gpu as on_gpu,
    out_of_memory as out_of_memory,
    tf32 as tf32,
    wide_products as wide_products,
)
from .errors import InputError as InputError, Stopped as Stopped
from .files import (
    CHECKSUMS as CHECKSUMS,
    check_intact as check_intact,
    check_place as check_place,
    check_plain as check_plain,
    digest as digest,
    forget as forget,
    is_recorded as is_recorded,
    locked as locked,
    named as named,
    naming as naming,
    read_arrays as read_arrays,
    read_json as read_json,
    read_table as read_table,
    read_text as read_text,
    read_yaml as read_yaml,
    record as record,
    recorded as recorded,
    replacing as replacing,
    write_arrays as write_arrays,
    write_json as write_json,
    write_text as write_text,
)
from .machine import available_memory as available_memory, cores as cores, read_fact as read_fact
from .onednn import (
    matrix_products as matrix_products,
    onednn_error as onednn_error,
    use_onednn as use_onednn,
)
from .parallel import (
    Overlapping as Overlapping,
    ProcessGroup as ProcessGroup,
    alone as alone,
    join as join,
)
from .pickles import (
    read_ind as read_ind,
    read_pickle as read_pickle,
    to_array as to_array,
    write_pickle as write_pickle,
    write_poses as write_poses,
)
from .private import (
    abbreviate as abbreviate,
    actions_of as actions_of,
    all_finite as all_finite,
    multiply as multiply,
    replaced as replaced,
)
from .progress import bar as bar, logging_to as logging_to, on_terminal as on_terminal
from .registry import (
    BUILTIN as BUILTIN,
    KINDS as KINDS,
    CommandSpec as CommandSpec,
    Registry as Registry,
    warn as warn,
)
from .streams import forgive as forgive
from .text import number as number, plain_number as plain_number, text_table as text_table
from .version import __version__ as __version__
