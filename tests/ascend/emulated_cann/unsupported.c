// SPDX-License-Identifier: Apache-2.0
// The remaining names that libtorch_npu.so must find when it is loaded, without the headers: calling one is an error
// that names it. Profiling and logging have nothing to do and succeed.
int emulated_cann_unsupported(const char* name);

#define UNSUPPORTED(name)                    \
  int name(void) {                           \
    return emulated_cann_unsupported(#name); \
  }
#define NOTHING_TO_DO(name) \
  int name(void) {          \
    return 0;               \
  }

NOTHING_TO_DO(MsprofGetHashId)
NOTHING_TO_DO(MsprofRegisterCallback)
NOTHING_TO_DO(MsprofReportAdditionalInfo)
NOTHING_TO_DO(MsprofReportApi)
NOTHING_TO_DO(MsprofReportCompactInfo)
NOTHING_TO_DO(MsprofSysCycleTime)
NOTHING_TO_DO(aclAppLog)
NOTHING_TO_DO(aclmdlFinalizeDump)

UNSUPPORTED(aclGetDeviceCapability)
UNSUPPORTED(aclmdlInitDump)
UNSUPPORTED(aclmdlSetDump)

// Compiled operators, which torch_npu falls back to where libopapi.so lacks an aclnn function.
UNSUPPORTED(aclCreateDataBuffer)
UNSUPPORTED(aclCreateTensorDesc)
UNSUPPORTED(aclDestroyDataBuffer)
UNSUPPORTED(aclDestroyTensorDesc)
UNSUPPORTED(aclGetTensorDescDimV2)
UNSUPPORTED(aclGetTensorDescFormat)
UNSUPPORTED(aclGetTensorDescNumDims)
UNSUPPORTED(aclGetTensorDescType)
UNSUPPORTED(aclSetTensorDescName)
UNSUPPORTED(aclSetTensorFormat)
UNSUPPORTED(aclSetTensorPlaceMent)
UNSUPPORTED(aclSetTensorShape)
UNSUPPORTED(aclopCompileAndExecute)
UNSUPPORTED(aclopCompileAndExecuteV2)
UNSUPPORTED(aclopCreateAttr)
UNSUPPORTED(aclopDestroyAttr)
UNSUPPORTED(aclopSetAttrBool)
UNSUPPORTED(aclopSetAttrDataType)
UNSUPPORTED(aclopSetAttrFloat)
UNSUPPORTED(aclopSetAttrInt)
UNSUPPORTED(aclopSetAttrListBool)
UNSUPPORTED(aclopSetAttrListFloat)
UNSUPPORTED(aclopSetAttrListInt)
UNSUPPORTED(aclopSetAttrListListInt)
UNSUPPORTED(aclopSetAttrString)

// Loaded kernels, peers, mapped memory.
UNSUPPORTED(aclrtBinaryGetFunction)
UNSUPPORTED(aclrtBinaryLoadFromData)
UNSUPPORTED(aclrtDeviceEnablePeerAccess)
UNSUPPORTED(aclrtDeviceGetBareTgid)
UNSUPPORTED(aclrtFreePhysical)
UNSUPPORTED(aclrtGetFunctionAddr)
UNSUPPORTED(aclrtMallocPhysical)
UNSUPPORTED(aclrtMapMem)
UNSUPPORTED(aclrtMemExportToShareableHandle)
UNSUPPORTED(aclrtMemImportFromShareableHandle)
UNSUPPORTED(aclrtMemSetPidToShareableHandle)
UNSUPPORTED(aclrtProcessReport)
UNSUPPORTED(aclrtReleaseMemAddress)
UNSUPPORTED(aclrtReserveMemAddress)
UNSUPPORTED(aclrtUnmapMem)
UNSUPPORTED(rtDevBinaryRegister)
UNSUPPORTED(rtFunctionRegister)
UNSUPPORTED(rtGetC2cCtrlAddr)
UNSUPPORTED(rtKernelLaunch)
