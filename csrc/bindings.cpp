// Names only: each operation takes one tuple, the fields of its struct (kernels.h) in order, where
// a struct within it is a tuple too. Compiled twice: for _cpu, and with WARPO_CUDA for _cuda, whose
// operations take device and stream at the end.
#include <pybind11/pybind11.h>

#include <string>
#include <type_traits>
#include <utility>

#include "dlpack.h"
#include "kernels.h"
#include "math/offsets.h"

#ifdef WARPO_CUDA
#include "cuda/cuda.h"
#define WARPO_MODULE _cuda
namespace library = warpo::cuda;
#else
#include "cpu/cpu.h"
#define WARPO_MODULE _cpu
namespace library = warpo::cpu;
#endif

namespace py = pybind11;
using namespace warpo;

namespace {

// What `read_tensors` has set: the class of tensors, and how to read one.
PyTypeObject* tensor_class = nullptr;
const dlpack::ExchangeApi* exchange_api = nullptr;

// False where the capsule holds a version of the API that is not ours.
bool read_tensors(py::type type, py::capsule capsule) {
    const auto* const api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::kCapsule));
    if (!api) throw py::error_already_set();
    if (api->header.major != dlpack::kMajor || !api->read) return false;
    tensor_class = reinterpret_cast<PyTypeObject*>(type.release().ptr());  // for good
    exchange_api = api;
    return true;
}

// A call of a named tuple's class with its fields in their order: in place, without the dict that
// `type` makes of keywords, which takes 0.4 us.
PyObject* make_named_tuple(PyObject* cls, PyObject* const* given, size_t flags, PyObject* names) {
    // interned: the attribute cache of types finds no other string, 0.07 us
    static PyObject* const attribute = PyUnicode_InternFromString("_fields");
    const py::tuple fields = py::reinterpret_steal<py::tuple>(PyObject_GetAttr(cls, attribute));
    if (!fields) return nullptr;
    const Py_ssize_t count = PyTuple_GET_SIZE(fields.ptr()), first = PyVectorcall_NARGS(flags);
    const Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
    bool in_order = first + named == count;
    for (Py_ssize_t i = 0; i < named && in_order; ++i)
        in_order = PyTuple_GET_ITEM(names, i) == PyTuple_GET_ITEM(fields.ptr(), first + i);
    if (in_order) {
        auto* const type = reinterpret_cast<PyTypeObject*>(cls);
        PyObject* const made = type->tp_alloc(type, count);
        for (Py_ssize_t i = 0; made && i < count; ++i) {
            Py_INCREF(given[i]);
            PyTuple_SET_ITEM(made, i, given[i]);
        }
        return made;
    }
    // another order, or an error
    py::tuple arguments(first);
    for (Py_ssize_t i = 0; i < first; ++i)
        arguments[i] = py::reinterpret_borrow<py::object>(given[i]);
    py::dict keywords;
    for (Py_ssize_t i = 0; i < named; ++i)
        keywords[PyTuple_GET_ITEM(names, i)] = py::handle(given[first + i]);
    return PyType_Type.tp_call(cls, arguments.ptr(), keywords.ptr());
}

void call_in_place(py::type cls) {
    reinterpret_cast<PyTypeObject*>(cls.ptr())->tp_vectorcall = make_named_tuple;
}

struct Anything {
    template <class T>
    operator T() const;
};

template <class T, size_t... I>
constexpr auto has_fields(std::index_sequence<I...>)
    -> decltype(T{((void)I, std::declval<Anything>())...}, true) {
    return true;
}
template <class T>
constexpr bool has_fields(...) {
    return false;
}

// Number of fields of an aggregate: what its braces take.
template <class T, size_t N = 1>
constexpr size_t count_fields() {
    if constexpr (has_fields<T>(std::make_index_sequence<N>()))
        return count_fields<T, N + 1>();
    else
        return N - 1;
}

// Reads a tuple from left to right into whatever type is asked for.
class Reader {
public:
    Reader(const char* operation, py::handle tuple) : operation_(operation), tuple_(tuple.ptr()) {}

    template <class T>
    T read() {
        if constexpr (std::is_same_v<T, View>)
            return view(next());
        else if constexpr (std::is_same_v<T, void*>)
            return PyLong_AsVoidPtr(next());
        else if constexpr (std::is_pointer_v<T>)
            return static_cast<T>(view(next()).data);
        else if constexpr (std::is_floating_point_v<T>)
            return static_cast<T>(PyFloat_AsDouble(next()));
        else if constexpr (std::is_integral_v<T>)
            return static_cast<T>(PyLong_AsLongLong(next()));
        else
            return read_tuple<T>();
    }

    void finish() const {
        if (PyErr_Occurred()) throw py::error_already_set();
        if (position_ != PyTuple_GET_SIZE(tuple_)) fail("too many arguments");
    }

private:
    struct Field {
        Reader& reader;
        template <class T>
        operator T() const {
            return reader.read<T>();
        }
    };

    // Braces evaluate from left to right.
    template <class T, size_t... I>
    T fields(std::index_sequence<I...>) {
        return T{((void)I, Field{*this})...};
    }

    template <class T>
    T read_tuple() {
        PyObject* const source = next();
        if (!PyTuple_Check(source))
            fail("argument " + std::to_string(position_) + " must be a tuple");
        Reader reader(operation_, source);
        const T found = reader.fields<T>(std::make_index_sequence<count_fields<T>()>());
        reader.finish();
        return found;
    }

    PyObject* next() {
        if (PyErr_Occurred()) throw py::error_already_set();
        if (position_ == PyTuple_GET_SIZE(tuple_)) fail("too few arguments");
        return PyTuple_GET_ITEM(tuple_, position_++);
    }

    // A tensor, (data_ptr, stride0, stride1, dtype) or None
    View view(PyObject* source) const {
        if (source == Py_None) return {};
        if (exchange_api && PyObject_TypeCheck(source, tensor_class)) {
            dlpack::Tensor tensor;
            if (exchange_api->read(source, &tensor)) throw py::error_already_set();
            const View found = dlpack::view_of(tensor);
            if (found.dtype < 0)
                fail("argument " + std::to_string(position_) + " is of an unknown dtype");
            return found;
        }
        if (!PyTuple_Check(source) || PyTuple_GET_SIZE(source) != 4)
            fail("argument " + std::to_string(position_) + " must be a tensor or None");
        return {PyLong_AsVoidPtr(PyTuple_GET_ITEM(source, 0)),
                PyLong_AsLongLong(PyTuple_GET_ITEM(source, 1)),
                PyLong_AsLongLong(PyTuple_GET_ITEM(source, 2)),
                static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(source, 3)))};
    }

    [[noreturn]] void fail(const std::string& problem) const {
        throw py::type_error(std::string(operation_) + ": " + problem);
    }

    const char* operation_;
    PyObject* tuple_;
    Py_ssize_t position_ = 0;
};

template <class Result, class... Arguments>
void define_function(py::module_& m, const char* name, Result (*function)(Arguments...)) {
    m.def(name, [name, function](py::args tuple) {
        Reader reader(name, tuple);
        std::tuple<std::decay_t<Arguments>...> arguments{reader.read<std::decay_t<Arguments>>()...};
        reader.finish();
        py::gil_scoped_release unlocked;
        return std::apply(function, arguments);
    });
}

template <class Arguments, class... Stream>
void define(py::module_& m, const char* name, void (*operation)(const Arguments&, Stream...)) {
    m.def(name, [name, operation](py::args given) {
        Reader reader(name, given);
        std::tuple<Arguments, Stream...> arguments{
            reader.read<Arguments>(), Stream{reader.read<int>(), reader.read<void*>()}...};
        reader.finish();
        py::gil_scoped_release unlocked;
        std::apply(operation, arguments);
    });
}

}  // namespace

PYBIND11_MODULE(WARPO_MODULE, m) {
    m.def("read_tensors", &read_tensors);
    m.def("call_in_place", &call_in_place);
#ifdef WARPO_CUDA
    m.def("build", [] {
        const library::Build found = library::build();
        py::tuple capabilities(found.capabilities.size());
        for (size_t i = 0; i < capabilities.size(); ++i) capabilities[i] = found.capabilities[i];
        return py::make_tuple(capabilities, found.runtime, found.driver);
    });
#else
    m.def("instruction_set", &library::instruction_set);
    define_function(m, "first_and_last", &first_and_last);
    define_function(m, "first_malformed", &first_malformed);
    define_function(m, "first_malformed_end", &first_malformed_end);
#endif
#define WARPO_DEFINE(operation, Arguments) define(m, #operation, library::operation);
    WARPO_OPERATIONS(WARPO_DEFINE)
#if defined(__x86_64__) && !defined(WARPO_CUDA)
    const std::string instructions = library::instruction_set();
    if (instructions == "avx512" || instructions == "avx512bf16") {
        WARPO_DEFINE(float32_product, MatrixProduct)
    }
#ifdef WARPO_AVX512_BF16
    if (instructions == "avx512bf16") {
        WARPO_DEFINE(bfloat16_product, MatrixProduct)
    }
#endif
#endif
}
