# Sets SPILLOVER_CUDA_INCLUDE_DIR to a folder with cuda.h, cuda_runtime_api.h and crt/.
#
# The small wheels nvidia-cuda-runtime and nvidia-cuda-crt are build requirements, so a build needs
# neither nvcc nor a toolkit. A toolkit is used only where the wheels are missing.
if(NOT SPILLOVER_CUDA_INCLUDE_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
"import importlib.util, os
spec = importlib.util.find_spec('nvidia')
for root in (spec.submodule_search_locations if spec else []):
    folder = os.path.join(root, 'cu13', 'include')
    if os.path.exists(os.path.join(folder, 'cuda.h')) and os.path.exists(
        os.path.join(folder, 'crt', 'host_defines.h')
    ):
        print(folder)
        break"
    OUTPUT_VARIABLE wheel_include OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(wheel_include)
    set(SPILLOVER_CUDA_INCLUDE_DIR "${wheel_include}")
  else()
    find_path(toolkit_include NAMES crt/host_defines.h PATHS /usr/local/cuda/include $ENV{CUDA_HOME}/include)
    if(NOT toolkit_include)
      message(FATAL_ERROR "No CUDA headers: run 'pip install nvidia-cuda-runtime nvidia-cuda-crt' "
                          "(version 13), or pass -DSPILLOVER_CUDA_INCLUDE_DIR=FOLDER.")
    endif()
    set(SPILLOVER_CUDA_INCLUDE_DIR "${toolkit_include}")
  endif()
  set(SPILLOVER_CUDA_INCLUDE_DIR "${SPILLOVER_CUDA_INCLUDE_DIR}" CACHE PATH "CUDA headers")
endif()
message(STATUS "CUDA headers: ${SPILLOVER_CUDA_INCLUDE_DIR}")
