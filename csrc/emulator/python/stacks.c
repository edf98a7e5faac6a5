/* Where in the Python program a call was made, cheap enough to be asked at every operator.
 *
 * Note [Stacks without the lock]: operators and allocators call the emulated driver without the
 * interpreter's lock, sometimes under locks of their own, so waiting for the interpreter here could
 * wait for ever. A thread's own frames do not change while it is in a call, and neither do the code
 * objects that they run, so they are read in place. A stack that was not met before is put into
 * words at once, because its code may be gone when a report needs it; after that a stack is a
 * number.
 *
 * The layout of frames belongs to each version of the interpreter; where it is not known here
 * (SPILLOVER_HAS_FRAMES is 0), stacks are unknown.
 *
 * Any thread may call.
 */
#define PY_SSIZE_T_CLEAN
#define Py_BUILD_CORE 1
#include <Python.h>
#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030E0000
#include <internal/pycore_frame.h>
#define SPILLOVER_HAS_FRAMES 1
#elif PY_VERSION_HEX < 0x030B0000
#include <frameobject.h>
#define SPILLOVER_HAS_FRAMES 1
#else
#define SPILLOVER_HAS_FRAMES 0
#endif

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "emulator/core/c_api.h"

enum { kFramesMax = 12, kShownMax = 6, kStacksMax = 1 << 16, kSlots = 1 << 18, kTextMax = 1024 };

struct frame {
  PyCodeObject* code; /* compared, never followed once the stack is in the table */
  int offset;
};

struct stack {
  uint64_t hash;
  int depth;
  struct frame frames[kFramesMax];
  char* text;
};

/* Guarded by lock. Slots hold numbers of stacks, 0 where empty; stacks are never freed. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct stack* stacks[kStacksMax];
static uint32_t stack_count = 1;
static uint32_t slots[kSlots];

#if SPILLOVER_HAS_FRAMES

static int read_frames(PyThreadState* thread, struct frame* frames) {
  int depth = 0;
#if PY_VERSION_HEX < 0x030B0000
  for (PyFrameObject* f = thread->frame; f != NULL && depth < kFramesMax; f = f->f_back) {
    frames[depth].code = f->f_code;
    frames[depth].offset = f->f_lasti * (int)sizeof(_Py_CODEUNIT);
    ++depth;
  }
#else
#if PY_VERSION_HEX < 0x030D0000
  struct _PyInterpreterFrame* f = thread->cframe->current_frame;
#else
  struct _PyInterpreterFrame* f = thread->current_frame;
#endif
  for (; f != NULL && depth < kFramesMax; f = f->previous) {
#if PY_VERSION_HEX >= 0x030C0000
    if (f->owner == FRAME_OWNED_BY_CSTACK) continue;
#endif
#if PY_VERSION_HEX >= 0x030D0000
    if (!PyCode_Check(f->f_executable)) continue;
    PyCodeObject* code = (PyCodeObject*)f->f_executable;
    const _Py_CODEUNIT* at = f->instr_ptr;
#else
    PyCodeObject* code = f->f_code;
    const _Py_CODEUNIT* at = f->prev_instr;
#endif
    frames[depth].code = code;
    frames[depth].offset = (int)((const char*)at - (const char*)_PyCode_CODE(code));
    ++depth;
  }
#endif
  return depth;
}

/* Characters beyond ASCII become question marks: converting them would need the interpreter. */
static void append_string(char* out, size_t capacity, PyObject* string) {
  size_t length = strlen(out);
  if (string == NULL || !PyUnicode_Check(string)) return;
  for (Py_ssize_t i = 0; i < PyUnicode_GET_LENGTH(string) && length + 1 < capacity; ++i) {
    const Py_UCS4 character = PyUnicode_READ_CHAR(string, i);
    out[length++] = character < 128 ? (char)character : '?';
  }
  out[length] = '\0';
}

static int is_library(const char* file) {
  return strstr(file, "/torch/") != NULL || strstr(file, "/spillover/") != NULL ||
         strncmp(file, "<frozen", 7) == 0;
}

/* Innermost frame last, one a line. Frames of torch and of this package are left out where the
 * program's own are there. */
static char* describe(const struct stack* stack) {
  char lines[kFramesMax][kTextMax];
  int from_program[kFramesMax];
  int programs = 0;
  for (int i = 0; i < stack->depth; ++i) {
    PyCodeObject* code = stack->frames[i].code;
    char file[512] = "";
    char name[256] = "";
    append_string(file, sizeof file, code->co_filename);
#if PY_VERSION_HEX >= 0x030B0000
    append_string(name, sizeof name, code->co_qualname);
#else
    append_string(name, sizeof name, code->co_name);
#endif
    const int line = PyCode_Addr2Line(code, stack->frames[i].offset);
    snprintf(lines[i], kTextMax, "File \"%s\", line %d, in %s", file, line, name);
    from_program[i] = !is_library(file);
    programs += from_program[i];
  }
  char text[kFramesMax * kTextMax] = "";
  int shown = 0;
  int first = stack->depth;
  while (first > 0 && shown < kShownMax) { /* from the innermost outwards: which are shown */
    const int i = stack->depth - first;
    shown += programs == 0 || from_program[i];
    --first;
  }
  for (int i = stack->depth - first - 1; i >= 0; --i) {
    if (programs != 0 && !from_program[i]) continue;
    if (*text != '\0') strcat(text, "\n");
    strcat(text, lines[i]);
  }
  return strdup(text);
}

struct recent {
  uint64_t hash;
  uint32_t id;
};

static _Thread_local struct recent recent_stacks[64];

static uint32_t capture(void) {
  PyThreadState* thread = PyGILState_GetThisThreadState();
  if (thread == NULL) return 0;
  struct stack found;
  found.depth = read_frames(thread, found.frames);
  if (found.depth == 0) return 0;
  uint64_t hash = 0xCBF29CE484222325u;
  for (int i = 0; i < found.depth; ++i) {
    hash = (hash ^ (uint64_t)(uintptr_t)found.frames[i].code) * 0x9E3779B97F4A7C15u;
    hash = (hash ^ (uint64_t)found.frames[i].offset ^ hash >> 29) * 0xBF58476D1CE4E5B9u;
  }
  found.hash = hash;
  /* A program calls from the same places again and again. */
  struct recent* known = &recent_stacks[hash >> 58];
  if (known->hash == hash) return known->id;
  pthread_mutex_lock(&lock);
  uint32_t slot = (uint32_t)(hash >> 40) & (kSlots - 1);
  uint32_t id = 0;
  for (; slots[slot] != 0; slot = (slot + 1) & (kSlots - 1)) {
    if (stacks[slots[slot]]->hash != hash) continue;
    id = slots[slot];
    break;
  }
  if (id == 0 && stack_count < kStacksMax) {
    struct stack* kept = malloc(sizeof *kept);
    if (kept != NULL) {
      *kept = found;
      kept->text = describe(&found);
      id = stack_count++;
      stacks[id] = kept;
      slots[slot] = id;
    }
  }
  pthread_mutex_unlock(&lock);
  known->hash = hash;
  known->id = id;
  return id;
}

#else

static uint32_t capture(void) {
  return 0;
}

#endif

static size_t format(uint32_t site, char* out, size_t capacity) {
  pthread_mutex_lock(&lock);
  const char* text = site < stack_count && site != 0 ? stacks[site]->text : NULL;
  pthread_mutex_unlock(&lock);
  if (text == NULL) text = "";
  const size_t length = strlen(text);
  if (capacity > 0) {
    const size_t kept = length < capacity ? length : capacity - 1;
    memcpy(out, text, kept);
    out[kept] = '\0';
  }
  return length;
}

typedef void (*set_stacks_function)(uint32_t (*)(void), size_t (*)(uint32_t, char*, size_t));

static PyObject* install(PyObject* self, PyObject* address) {
  (void)self;
  void* function = PyLong_AsVoidPtr(address);
  if (function == NULL) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "the function's address is 0");
    return NULL;
  }
  ((set_stacks_function)(uintptr_t)function)(capture, format);
  return PyBool_FromLong(SPILLOVER_HAS_FRAMES);
}

/* For threads that wait for their turn on the virtual clock. */
static int release_interpreter(void** state) {
  if (!Py_IsInitialized() || PyGILState_GetThisThreadState() == NULL || !PyGILState_Check()) return 0;
  *state = PyEval_SaveThread();
  return 1;
}

static void restore_interpreter(void* state) {
  PyEval_RestoreThread(state);
}

typedef void (*set_interpreter_function)(int (*)(void**), void (*)(void*));

static PyObject* install_interpreter(PyObject* self, PyObject* address) {
  (void)self;
  void* function = PyLong_AsVoidPtr(address);
  if (function == NULL) {
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "the function's address is 0");
    return NULL;
  }
  ((set_interpreter_function)(uintptr_t)function)(release_interpreter, restore_interpreter);
  Py_RETURN_NONE;
}

static PyObject* here(PyObject* self, PyObject* arguments) {
  (void)self;
  (void)arguments;
  char text[kFramesMax * kTextMax];
  format(capture(), text, sizeof text);
  return PyUnicode_FromString(text);
}

static PyMethodDef methods[] = {
    {"install", install, METH_O,
     "Hand the stacks to the function at this address; False where frames cannot be read."},
    {"install_interpreter", install_interpreter, METH_O,
     "Hand the interpreter lock's release and return to the function at this address."},
    {"here", here, METH_NOARGS, "The calling thread's stack, in the words of a report."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "_emulator_stacks", NULL, -1, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__emulator_stacks(void) {
  return PyModule_Create(&definition);
}
