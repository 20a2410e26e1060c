// Names only: each operation takes one tuple, the fields of its struct (kernels.h) in order, where
// a struct within it is a tuple too. Compiled twice: for _cpu, and with WARPO_CUDA for _cuda, whose
// operations take device and stream at the end.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

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

template <class T>
constexpr bool is_list = false;
template <class T>
constexpr bool is_list<std::vector<T>> = true;

// Reads a tuple from left to right into whatever type is asked for.
class Reader {
public:
    Reader(const char* operation, py::handle tuple) : operation_(operation), tuple_(tuple.ptr()) {}

    template <class T>
    T read() {
        if constexpr (std::is_same_v<T, View>)
            return view(next());
        else if constexpr (std::is_same_v<T, Matrix>)
            return matrix(next());
        else if constexpr (is_list<T>)
            return read_list<T>();
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

    template <class T>
    T read_list() {
        PyObject* const source = next();
        if (!PyList_Check(source))
            fail("argument " + std::to_string(position_) + " must be a list");
        const py::tuple items = py::reinterpret_steal<py::tuple>(PyList_AsTuple(source));
        Reader reader(operation_, items);
        T found(items.size());
        for (auto& item : found) item = reader.read<typename T::value_type>();
        return found;
    }

    PyObject* next() {
        if (PyErr_Occurred()) throw py::error_already_set();
        if (position_ == PyTuple_GET_SIZE(tuple_)) fail("too few arguments");
        return PyTuple_GET_ITEM(tuple_, position_++);
    }

    bool is_tensor(PyObject* source) const {
        return exchange_api && PyObject_TypeCheck(source, tensor_class);
    }

    dlpack::Tensor tensor(PyObject* source) const {
        dlpack::Tensor tensor;
        if (exchange_api->read(source, &tensor)) throw py::error_already_set();
        if (dlpack::dtype_of(tensor) < 0)
            fail("argument " + std::to_string(position_) + " is of an unknown dtype");
        return tensor;
    }

    // A tensor, or (data_ptr, stride0, stride1, dtype, rows, columns)
    Matrix matrix(PyObject* source) const {
        if (is_tensor(source)) return dlpack::matrix_of(tensor(source));
        const View found = view(source);
        if (!found.data || PyTuple_GET_SIZE(source) != 6)
            fail("argument " + std::to_string(position_) + " must be a tensor");
        return {found, PyLong_AsLongLong(PyTuple_GET_ITEM(source, 4)),
                PyLong_AsLongLong(PyTuple_GET_ITEM(source, 5))};
    }

    // A tensor, (data_ptr, stride0, stride1, dtype, ...) or None
    View view(PyObject* source) const {
        if (source == Py_None) return {};
        if (is_tensor(source)) return dlpack::view_of(tensor(source));
        if (!PyTuple_Check(source) || PyTuple_GET_SIZE(source) < 4)
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

// Whether a tensor is of the class Tensor or `parameter`, not empty, and its memory what pointer
// and strides say.
bool read_plain(PyObject* source, py::handle parameter, dlpack::Tensor* found) {
    static PyObject* const is_neg = PyObject_GetAttrString((PyObject*)tensor_class, "is_neg");
    PyTypeObject* const type = Py_TYPE(source);
    if (type != tensor_class && (PyObject*)type != parameter.ptr()) return false;
    if (exchange_api->read(source, found)) {
        PyErr_Clear();
        return false;
    }
    const auto negative = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg, source));
    if (!negative) throw py::error_already_set();
    return found->data && negative.ptr() == Py_False && dlpack::size_of(*found) > 0 &&
           dlpack::dtype_of(*found) >= 0;
}

// Whether `tensor` is dense, or rows of dense columns that do not overlap.
bool has_rows(const dlpack::Tensor& tensor) {
    return dlpack::is_dense(tensor) ||
           (tensor.ndim == 2 && tensor.strides[1] == 1 && tensor.strides[0] >= tensor.shape[1]);
}

// Whether `tensor` is dense, of the shape of `like` or flat, and on its device.
bool fits(const dlpack::Tensor& tensor, const dlpack::Tensor& like) {
    if (tensor.device_type != like.device_type || tensor.device_id != like.device_id) return false;
    if (!dlpack::is_dense(tensor)) return false;
    if (tensor.ndim == 1) return tensor.shape[0] == dlpack::size_of(like);
    return tensor.ndim == like.ndim &&
           std::equal(tensor.shape, tensor.shape + tensor.ndim, like.shape);
}

#ifndef WARPO_CUDA
// A fast look at lists of hundreds of tensors, all of one length: for each list its dtypes, as the
// bits 1 << DType, if all tensors are plain and on one device, those of the first list are as
// `has_rows` says, and the others fit the one at their place there. Else zeros: one of them is to
// be looked at closely.
std::vector<int> plain_dtypes(py::handle parameter, const std::vector<py::list>& lists) {
    const size_t count = lists.at(0).size();
    const std::vector<int> none(lists.size());
    std::vector<int> dtypes(none);
    dlpack::Tensor first, at_place, tensor;
    for (size_t i = 0; i < count && exchange_api; ++i) {
        if (!read_plain(PyList_GET_ITEM(lists[0].ptr(), i), parameter, &at_place)) return none;
        if (i == 0) first = at_place;
        if (at_place.device_type != first.device_type || at_place.device_id != first.device_id ||
            !has_rows(at_place))
            return none;
        dtypes[0] |= 1 << dlpack::dtype_of(at_place);
        for (size_t k = 1; k < lists.size(); ++k) {
            if (!read_plain(PyList_GET_ITEM(lists[k].ptr(), i), parameter, &tensor) ||
                !fits(tensor, at_place))
                return none;
            dtypes[k] |= 1 << dlpack::dtype_of(tensor);
        }
    }
    return dtypes;
}
#endif

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
    m.def("plain_dtypes", [](py::handle parameter, py::args given) {
        std::vector<py::list> lists;
        for (const py::handle list : given) lists.push_back(list.cast<py::list>());
        return plain_dtypes(parameter, lists);
    });
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
