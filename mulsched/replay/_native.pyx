"""The native simulation core: a shim on csrc/engine.hpp and csrc/replay.hpp that owns memory and translates.

The twins are _engine_py.py and _replay_py.py. A replay runs without the GIL and takes it to ask a policy that
the core cannot compute, to call a step time that it does not know, and to tell of progress.
"""

cimport cython
from cpython.exc cimport PyErr_CheckSignals
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_ND, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cython.operator cimport dereference
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcpy
from libcpp cimport bool as cbool
from libcpp.deque cimport deque
from libcpp.memory cimport unique_ptr
from libcpp.string cimport string
from libcpp.vector cimport vector

import numpy as np

from mulsched.indicators import Columns
from mulsched.policies._policy import select
from mulsched.replay.records import Counts
from mulsched.replay.step import CacheChange, StepLoad, StepResult
from mulsched.replay.step_table import StepTable
from mulsched.replay.step_time import FittedStep, MoeRoofline, Roofline
from mulsched.scorers import native_form
from mulsched.types import Request

cdef extern from *:
    """
    #ifndef MULSCHED_SOURCE_DIGEST
    #define MULSCHED_SOURCE_DIGEST ""
    #endif
    """
    const char* MULSCHED_SOURCE_DIGEST

cdef extern from "engine.hpp" namespace "mulsched" nogil:
    cdef cppclass CLimits "mulsched::EngineLimits":
        int64_t block_size, kv_blocks, max_batched_tokens, max_num_seqs, watermark_blocks
        cbool schedules_ahead

    cdef cppclass CStepLoad "mulsched::StepLoad":
        int64_t new_tokens
        double prefix_tokens
        int64_t decode_batch
        double decode_context
        double pair_prefix_tokens

    cdef cppclass CFirstToken "mulsched::Engine::FirstToken":
        int64_t request, cached_tokens

    cdef cppclass CChange "mulsched::Engine::Change":
        size_t begin, end
        cbool stored, has_parent
        uint64_t parent

    cdef cppclass CEngine "mulsched::Engine":
        CEngine(const CLimits&) except +
        void submit(int64_t, const uint64_t*, size_t, size_t, int64_t, int64_t, int64_t) except +
        cbool start_step(CStepLoad&) except +
        void end_step(vector[CFirstToken]&, vector[int64_t]&) except +
        const vector[CChange]& changes() except +
        const uint64_t* change_keys()
        void clear_changes()
        int64_t preemptions()
        string check() except +
        vector[uint64_t] cached_keys() except +

cdef extern from "step_time.hpp" namespace "mulsched" nogil:
    cdef cppclass CStepTime "mulsched::StepTime":
        pass

    cdef cppclass CRoofline "mulsched::Roofline"(CStepTime):
        double active_parameters, shared_parameters, expert_parameters
        vector[double] expert_share
        double kv_bytes, attention_flops, compute, bandwidth, overhead_s

    cdef cppclass CFittedStep "mulsched::FittedStep"(CStepTime):
        double step_s, decode_s, context_s, prefill_s, new_token_s, attention_s, mixed_decode_s

    cdef cppclass CStepTable "mulsched::StepTable"(CStepTime):
        vector[double] new_grid, prefix_grid, prefill_s, batch_grid, context_grid, decode_s, decode_floor_s
        vector[double] mixed_new_grid, mixed_batch_grid, mixed_context_grid, mixed_ratio

cdef extern from "replay.hpp" namespace "mulsched" nogil:
    const size_t kColumns

    enum class Ties "mulsched::Ties":
        kLeastRecent, kRandom, kFirst

    enum class Divisor "mulsched::Divisor":
        kNone, kMax, kPrompt

    enum class Mitigation "mulsched::Mitigation":
        kSpread, kExclude, kLoadOnly

    cdef cppclass CFusedScore "mulsched::FusedScore":
        vector[size_t] columns
        vector[double] weights
        vector[Divisor] divisors

    cdef cppclass CTraceView "mulsched::TraceView":
        int64_t n, parts
        const double* arrival_s
        const double* think_s
        const int64_t* prompt_tokens
        const int64_t* output_tokens
        const int64_t* run_start
        const int64_t* run_length
        const int64_t* run_offset
        const int64_t* follows

    cdef cppclass COptions "mulsched::ReplayOptions":
        int64_t block_size, prefill_instances, decode_instances
        cbool predicted, in_flight
        double state_delay_s, event_loss_ratio, transfer_s_per_token
        uint64_t seed

    cdef cppclass CRecords "mulsched::ReplayRecords":
        double* arrival_s
        double* first_token_s
        double* finish_s
        int64_t* instance
        int64_t* decode_instance
        int64_t* cached_tokens
        int64_t* hit_tokens

    cdef cppclass CPool "mulsched::Pool":
        CFusedScore score
        Ties ties
        cbool tells
        vector[int64_t] table, rows
        int64_t decisions

    cdef cppclass CReplay "mulsched::Replay":
        CReplay(const CTraceView&, const COptions&, const CLimits&, const CStepTime&, const CRecords&,
                CHost&) except +
        deque[CPool]& pools()
        void guard(size_t, double, double, Mitigation, cbool) except +
        int64_t alarms(size_t)
        int64_t orphans()
        int64_t lost_messages()
        int64_t preemptions()
        cbool run() except +

cdef extern from *:
    """
    #include "replay.hpp"

    namespace {

    using Choose = std::int64_t (*)(void*, std::size_t, std::int64_t, double, const std::uint64_t*, std::size_t,
                                    const mulsched::Pool&);
    using GoOn = bool (*)(void*, std::int64_t);
    using Told = void (*)(void*, std::size_t, std::int64_t);
    using CallStepTime = double (*)(void*, const mulsched::StepLoad&);

    class PythonHost final : public mulsched::ReplayHost {
     public:
      PythonHost(void* host, Choose choose, GoOn go_on, Told first_token, Told ended)
          : host_(host), choose_(choose), go_on_(go_on), first_token_(first_token), ended_(ended) {}
      std::int64_t choose(std::size_t pool, std::int64_t request, double now, const mulsched::Key* keys,
                          std::size_t n_keys, const mulsched::Pool& state) override {
        return choose_(host_, pool, request, now, keys, n_keys, state);
      }
      bool go_on(std::int64_t finished) override { return go_on_(host_, finished); }
      void first_token(std::size_t pool, std::int64_t request) override { first_token_(host_, pool, request); }
      void ended(std::size_t pool, std::int64_t request) override { ended_(host_, pool, request); }

     private:
      void* host_;
      Choose choose_;
      GoOn go_on_;
      Told first_token_, ended_;
    };

    // Any callable; an error it raises is kept by the host and stops the replay at the next arrival.
    class PythonStepTime final : public mulsched::StepTime {
     public:
      PythonStepTime(void* host, CallStepTime call) : host_(host), call_(call) {}
      double operator()(const mulsched::StepLoad& load) const override { return call_(host_, load); }

     private:
      void* host_;
      CallStepTime call_;
    };

    }  // namespace
    """
    cdef cppclass CHost "PythonHost":
        CHost(void*, int64_t (*)(void*, size_t, int64_t, double, const uint64_t*, size_t, const CPool&) noexcept,
              cbool (*)(void*, int64_t) noexcept, void (*)(void*, size_t, int64_t) noexcept,
              void (*)(void*, size_t, int64_t) noexcept) except +

    cdef cppclass CPythonStepTime "PythonStepTime"(CStepTime):
        CPythonStepTime(void*, double (*)(void*, const CStepLoad&) noexcept) except +

SOURCE_DIGEST = (<bytes> MULSCHED_SOURCE_DIGEST).decode()
"""Digest of the sources this module was built from; tests/test_build.py compares it with the checkout."""


@cython.final
cdef class Items:
    """A contiguous buffer of 8-byte numbers, held as long as this object lives."""

    cdef Py_buffer view

    def __cinit__(self, object array, cbool writable=False):
        PyObject_GetBuffer(array, &self.view, PyBUF_ND | PyBUF_FORMAT | (PyBUF_WRITABLE if writable else 0))
        if self.view.itemsize != 8 or self.view.ndim != 1:
            raise ValueError(f"one dimension of 8-byte items expected, got {self.view.ndim} of {self.view.itemsize}")

    def __dealloc__(self):
        PyBuffer_Release(&self.view)

    cdef size_t length(self) noexcept:
        return <size_t> self.view.shape[0]


cdef object array_of(const uint64_t* items, size_t n):
    cdef Items out
    array = np.empty(n, dtype=np.uint64)
    if n > 0:
        out = Items(array, True)
        memcpy(out.view.buf, items, n * sizeof(uint64_t))
    return array


cdef CLimits limits_of(object values) except *:
    """What ``Profile.limits`` returned."""
    cdef CLimits limits
    (limits.block_size, limits.kv_blocks, limits.max_batched_tokens, limits.max_num_seqs,
     limits.watermark_blocks, limits.schedules_ahead) = values
    if limits.block_size < 1 or not 1 <= limits.kv_blocks < 2**32 - 1:
        raise ValueError(f"block size of at least 1 and 1..2**32-2 blocks expected, got {values}")
    return limits


cdef class EngineNative:
    """One engine; the twin is EnginePy, the checks are EngineModel's."""

    cdef unique_ptr[CEngine] engine

    def __cinit__(self, block_size, kv_blocks, max_batched_tokens, max_num_seqs, watermark_blocks,
                  schedules_ahead=False):
        self.engine.reset(new CEngine(limits_of(
            (block_size, kv_blocks, max_batched_tokens, max_num_seqs, watermark_blocks, schedules_ahead))))

    @property
    def preemptions(self):
        """How often a request was taken off for want of blocks."""
        return self.engine.get().preemptions()

    def submit(self, int64_t request, keys, int64_t prompt_tokens, int64_t output_tokens,
               int64_t transferred_tokens):
        """Put a request into the waiting queue."""
        cdef Items path = Items(keys)
        self.engine.get().submit(request, <const uint64_t*> path.view.buf, path.length(), path.length(),
                                 prompt_tokens, output_tokens, transferred_tokens)

    def start_step(self):
        """Start a step; return what it computes, or None if there is nothing to do."""
        cdef CStepLoad load
        if not self.engine.get().start_step(load):
            return None
        return StepLoad(load.new_tokens, load.prefix_tokens, load.decode_batch, load.decode_context,
                        load.pair_prefix_tokens)

    def end_step(self):
        """End the step: tell first tokens, release what is done."""
        cdef vector[CFirstToken] first_tokens
        cdef vector[int64_t] finished
        self.engine.get().end_step(first_tokens, finished)
        return StepResult([(f.request, f.cached_tokens) for f in first_tokens], finished)

    def take_changes(self):
        """Return what changed in the cache since the last call, in order."""
        cdef CEngine* engine = self.engine.get()
        cdef const vector[CChange]* changes = &engine.changes()
        cdef CChange change
        cdef size_t i
        taken = []
        for i in range(changes.size()):
            change = changes[0][i]
            taken.append(CacheChange(array_of(engine.change_keys() + change.begin, change.end - change.begin),
                                     change.parent if change.has_parent else None, change.stored))
        engine.clear_changes()
        return taken

    def cached_keys(self):
        """Return every key that is cached now."""
        return set(self.engine.get().cached_keys())

    def check(self):
        """Raise AssertionError if a block is lost or shared wrongly."""
        cdef string wrong = self.engine.get().check()
        if not wrong.empty():
            raise AssertionError(wrong.decode())


# -- a whole replay -------------------------------------------------------------------------------------

@cython.final
cdef class Host:
    """What the loop asks of Python; keeps the first error that Python raises."""

    cdef object trace, options, progress, step_time, error, names
    cdef int64_t block_size
    cdef cbool counts_pairs

    cdef int64_t choose(self, size_t p, int64_t request, double now, object keys, const CPool* pool) except -1:
        cdef size_t n = pool.rows.size()
        cdef int64_t session = self.trace.session[request]
        cdef Py_buffer out
        policy = self.options.policies[p]
        table = np.empty((kColumns, n), dtype=np.int64)
        PyObject_GetBuffer(table, &out, PyBUF_WRITABLE)
        memcpy(out.buf, pool.table.data(), n * kColumns * sizeof(int64_t))
        PyBuffer_Release(&out)
        table.setflags(write=False)
        columns = Columns(
            request=Request(int(self.trace.prompt_tokens[request]), keys, request,
                            str(session) if session >= 0 else None),
            instances=self.names[p],
            rows=np.arange(n, dtype=np.int64),
            table=table,
            decision=pool.decisions,
            block_size=self.block_size,
            seed=self.options.seed,
            now=now,
        )
        judged = None if policy.detector is None else policy.detector.judge(columns)
        position, _ = select(policy, columns, self.options.ties[p], keep=None if judged is None else judged[0])
        if policy.on_dispatch is not None:
            policy.on_dispatch(columns, position)
        if policy.detector is not None:
            policy.detector.dispatch(columns, request, position)
        return position


cdef int64_t choose(void* host, size_t p, int64_t request, double now, const uint64_t* keys, size_t n_keys,
                    const CPool& pool) noexcept with gil:
    self = <Host> host
    if self.error is not None:
        return -1
    try:
        return self.choose(p, request, now, array_of(keys, n_keys), &pool)
    except BaseException as error:
        self.error = error
        return -1


cdef cbool go_on(void* host, int64_t finished) noexcept with gil:
    self = <Host> host
    if self.error is not None:
        return False
    try:
        PyErr_CheckSignals()
        if self.progress is not None:
            self.progress(finished, len(self.trace))
        return True
    except BaseException as error:
        self.error = error
        return False


cdef void first_token(void* host, size_t p, int64_t request) noexcept with gil:
    self = <Host> host
    if self.error is not None:
        return
    try:
        self.options.policies[p].detector.first_token(request)
    except BaseException as error:
        self.error = error


cdef void ended(void* host, size_t p, int64_t request) noexcept with gil:
    self = <Host> host
    if self.error is not None:
        return
    try:
        self.options.policies[p].detector.end(request)
    except BaseException as error:
        self.error = error


cdef double call_step_time(void* host, const CStepLoad& load) noexcept with gil:
    self = <Host> host
    if self.error is not None:
        return 1.0
    try:
        prefix = load.pair_prefix_tokens if self.counts_pairs else load.prefix_tokens
        return self.step_time(load.new_tokens, prefix, load.decode_batch, load.decode_context)
    except BaseException as error:
        self.error = error
        return 1.0


cdef CStepTime* roofline_of(object step_time) except NULL:
    cdef unique_ptr[CRoofline] made = unique_ptr[CRoofline](new CRoofline())
    cdef CRoofline* roofline = made.get()
    if type(step_time) is Roofline:  # one expert, which every token uses
        roofline.active_parameters = roofline.shared_parameters = step_time.parameters
    else:
        roofline.active_parameters = step_time.active_parameters
        roofline.shared_parameters = step_time.shared_parameters
        roofline.expert_parameters = step_time.expert_parameters
        roofline.expert_share = step_time.expert_share
    roofline.kv_bytes, roofline.attention_flops = step_time.kv_bytes, step_time.attention_flops
    roofline.compute, roofline.bandwidth = step_time.compute, step_time.bandwidth
    roofline.overhead_s = step_time.overhead_s
    return made.release()


cdef CStepTime* fitted_of(object fitted) except NULL:
    cdef unique_ptr[CFittedStep] made = unique_ptr[CFittedStep](new CFittedStep())
    cdef CFittedStep* step = made.get()
    step.step_s, step.decode_s, step.context_s = fitted.step_s, fitted.decode_s, fitted.context_s
    step.prefill_s, step.new_token_s = fitted.prefill_s, fitted.new_token_s
    step.attention_s, step.mixed_decode_s = fitted.attention_s, fitted.mixed_decode_s
    return made.release()


cdef CStepTime* table_of(object grids) except NULL:
    cdef unique_ptr[CStepTable] made = unique_ptr[CStepTable](new CStepTable())
    cdef CStepTable* table = made.get()
    table.new_grid, table.prefix_grid, table.prefill_s = grids.new_grid, grids.prefix_grid, grids.prefill_s
    table.batch_grid, table.context_grid = grids.batch_grid, grids.context_grid
    table.decode_s, table.decode_floor_s = grids.decode_s, grids.decode_floor_s
    table.mixed_new_grid, table.mixed_batch_grid = grids.mixed_new_grid, grids.mixed_batch_grid
    table.mixed_context_grid, table.mixed_ratio = grids.mixed_context_grid, grids.mixed_ratio
    return made.release()


cdef CStepTime* step_time_of(object step_time, Host host) except NULL:
    """The native form of a step time; one that is not known is called."""
    kind = type(step_time)
    if kind is Roofline or kind is MoeRoofline:
        return roofline_of(step_time)
    if kind is FittedStep:
        return fitted_of(step_time)
    if kind is StepTable:
        return table_of(step_time)
    return new CPythonStepTime(<void*> host, call_step_time)


@cython.final
cdef class Bound:
    """The C++ side of a trace's columns and the records, and the arrays that they lie in."""

    cdef list held
    cdef CTraceView trace
    cdef CRecords records

    cdef void* items(self, object array, cbool writable=False) except? NULL:
        held = Items(array, writable)
        self.held.append(held)
        return held.view.buf

    def __cinit__(self, trace, options, records):
        self.held = []
        follows = trace.previous if options.closed else np.full(len(trace), -1, dtype=np.int64)
        self.trace.n = len(trace)
        self.trace.parts = trace.block_size // options.profile.block_size
        self.trace.arrival_s = <const double*> self.items(trace.arrival_s)
        self.trace.think_s = <const double*> self.items(trace.think_s)
        self.trace.prompt_tokens = <const int64_t*> self.items(trace.prompt_tokens)
        self.trace.output_tokens = <const int64_t*> self.items(trace.output_tokens)
        self.trace.run_start = <const int64_t*> self.items(trace.run_start)
        self.trace.run_length = <const int64_t*> self.items(trace.run_length)
        self.trace.run_offset = <const int64_t*> self.items(trace.run_offset)
        self.trace.follows = <const int64_t*> self.items(follows)
        self.records.arrival_s = <double*> self.items(records.arrival_s, True)
        self.records.first_token_s = <double*> self.items(records.first_token_s, True)
        self.records.finish_s = <double*> self.items(records.finish_s, True)
        self.records.instance = <int64_t*> self.items(records.instance, True)
        self.records.decode_instance = <int64_t*> self.items(records.decode_instance, True)
        self.records.cached_tokens = <int64_t*> self.items(records.cached_tokens, True)
        self.records.hit_tokens = <int64_t*> self.items(records.hit_tokens, True)


def run_replay(trace, options, records, progress):
    """Replay the trace, fill the records and return what was counted; the twin is in _replay_py.py."""
    cdef Bound bound = Bound(trace, options, records)
    cdef COptions plain
    cdef Host host = Host()
    cdef unique_ptr[CHost] asked
    cdef unique_ptr[CStepTime] step_time
    cdef unique_ptr[CReplay] replay
    cdef cbool done
    cdef size_t p
    host.trace, host.options, host.progress, host.step_time = trace, options, progress, options.profile.step_time
    host.block_size = options.profile.block_size
    host.counts_pairs = getattr(options.profile.step_time, "counts_pairs", False)
    sizes = [options.prefill_instances] if options.prefill_instances else []
    sizes.append(options.decode_instances)
    first = 0
    host.names = []
    for size in sizes:
        host.names.append(tuple(f"instance-{first + i}" for i in range(size)))
        first += size
    plain.block_size = options.profile.block_size
    plain.prefill_instances, plain.decode_instances = options.prefill_instances, options.decode_instances
    plain.in_flight = options.in_flight == "cached"
    plain.predicted, plain.seed = options.predicted, options.seed % 2**64
    plain.state_delay_s, plain.event_loss_ratio = options.state_delay_s, options.event_loss_ratio
    plain.transfer_s_per_token = options.transfer_s_per_token
    asked.reset(new CHost(<void*> host, choose, go_on, first_token, ended))
    step_time.reset(step_time_of(options.profile.step_time, host))
    replay.reset(new CReplay(bound.trace, plain, limits_of(options.profile.limits(options.kv_blocks)),
                             dereference(step_time), bound.records, dereference(asked)))
    guards = {}
    for p in range(replay.get().pools().size()):
        policy, ties, guarded = options.policies[p], options.ties[p], None
        replay.get().pools()[p].ties = {
            "least_recent": Ties.kLeastRecent, "random": Ties.kRandom, "first": Ties.kFirst}[ties]
        replay.get().pools()[p].tells = policy.detector is not None
        if policy.detector is not None and policy.on_dispatch is None and not policy.filters:
            guarded = policy.detector.native_form()
        asks = policy.filters or policy.on_dispatch is not None or (policy.detector is not None and guarded is None)
        form = None if asks else native_form(policy.score)
        if form is None:
            continue
        replay.get().pools()[p].score.columns = form[0]
        replay.get().pools()[p].score.weights = form[1]
        for divisor in form[2]:
            replay.get().pools()[p].score.divisors.push_back(
                {None: Divisor.kNone, "max": Divisor.kMax, "prompt": Divisor.kPrompt}[divisor])
        if guarded is not None:
            confidence, horizon, mitigation, by_tokens = guarded
            replay.get().guard(p, confidence, horizon, {
                "spread": Mitigation.kSpread, "exclude": Mitigation.kExclude,
                "load_only": Mitigation.kLoadOnly}[mitigation], by_tokens)
            guards[p] = policy.detector
    with nogil:
        done = replay.get().run()
    if not done:
        raise host.error
    for p, detector in guards.items():
        detector.count_alarms(replay.get().alarms(p))
    counts = Counts()
    counts.preemptions = replay.get().preemptions()
    counts.lost_messages, counts.orphans = replay.get().lost_messages(), replay.get().orphans()
    return counts
